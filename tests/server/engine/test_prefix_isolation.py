"""Keys and values of a prompt are shared within one adapter content and one circle of readers, and nowhere else."""

import pytest
from engines import EngineBench
from tiny_models import make_peft_adapter, make_tiny_llama

from loraplex_server.engine.block_manager import hash_block, root_hash
from loraplex_server.messages import GenerateRequest, SamplingParams

PROMPT = [5 + i % 50 for i in range(70)]  # four full blocks and some


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> EngineBench:
    folder = tmp_path_factory.mktemp("prefix")
    model = make_tiny_llama(folder / "base")
    adapters = {name: make_peft_adapter(folder / name, model, seed=seed) for seed, name in enumerate(("v1", "v2"), 1)}
    return EngineBench(folder / "base", adapters)


def cached_tokens(bench: EngineBench, adapter: str | None, salt: str | None = None) -> int:
    """Run the prompt and say how many of its tokens were found in the cache."""
    request_id = f"r{len(bench.outputs)}"
    bench.outputs[request_id] = []
    bench.engine.add(
        GenerateRequest(
            request_id=request_id,
            prompt_token_ids=PROMPT,
            sampling=SamplingParams(max_new_tokens=2),
            adapter_id="the same name",
            adapter_digest=bench.specs[adapter].digest if adapter else None,
            cache_salt=salt,
        )
    )
    bench.run()
    return bench.outputs[request_id][0].num_cached_tokens


def test_identical_prompts_share_within_a_version_and_never_across_versions_adapters_and_tenants(
    bench: EngineBench,
) -> None:
    bench.start()
    circles = [(None, None), ("v1", None), ("v2", None), ("v1", "alice"), ("v1", "bob"), (None, "alice")]
    assert [cached_tokens(bench, *circle) for circle in circles] == [0] * len(circles)
    assert [cached_tokens(bench, *circle) for circle in circles] == [64] * len(circles)


def test_the_names_of_blocks_differ_by_content_and_by_salt() -> None:
    roots = {
        hash_block(root_hash(digest, salt), PROMPT[:16])
        for digest in (None, "one", "two")
        for salt in (None, "", "alice", "bob", "two")
    }
    assert len(roots) == 15


def test_an_adapter_loaded_anew_with_other_weights_reuses_nothing_of_the_old(bench: EngineBench) -> None:
    bench.start()
    assert cached_tokens(bench, "v1") == 0
    bench.engine.unload_adapter(bench.specs["v1"].digest)
    assert cached_tokens(bench, "v2") == 0
    bench.engine.load_adapter(bench.specs["v1"])
    assert cached_tokens(bench, "v1") == 64  # the same content is the same adapter
