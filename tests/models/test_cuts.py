"""The parts of all ranks together are the whole, and each part is a model of its own."""

from dataclasses import replace

import pytest

from loraplex_models.config import ExpertsConfig, ModelConfig, parse_config
from loraplex_models.cuts import CutError, RankPart, split

HEAD_DIM = 16


def model(num_heads: int, num_kv_heads: int, mlp: int = 1536) -> ModelConfig:
    return parse_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_kv_heads,
            "head_dim": HEAD_DIM,
            "hidden_size": num_heads * HEAD_DIM,
            "intermediate_size": mlp,
            "num_hidden_layers": 2,
            "vocab_size": 101,
        }
    )


def parts_of(config: ModelConfig, size: int) -> list[RankPart]:
    return [RankPart(config, rank, size) for rank in range(size)]


def outputs(part: RankPart, module: str) -> list[int]:
    cut = part.linear(f"layers.0.{module}")
    assert cut is not None and cut.outputs is not None and cut.inputs is None
    return [place for start, stop in cut.outputs.runs for place in range(start, stop)]


def inputs(part: RankPart, module: str) -> list[int]:
    cut = part.linear(f"model.layers.0.{module}")
    assert cut is not None and cut.inputs is not None and cut.outputs is None
    return [place for start, stop in cut.inputs.runs for place in range(start, stop)]


# SmolLM2 has 9 heads on 3, Qwen2.5-0.5B 14 on 2, Llama 3 32 on 8, Gemma 8 on 1.
SHAPES = [(9, 3, 2), (9, 3, 3), (9, 3, 4), (14, 2, 4), (14, 2, 8), (32, 8, 8), (32, 8, 16), (8, 1, 4), (4, 4, 3)]


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "size"), SHAPES)
def test_every_query_is_on_one_rank_beside_its_key(num_heads: int, num_kv_heads: int, size: int) -> None:
    config = model(num_heads, num_kv_heads)
    parts = parts_of(config, size)
    queries = [outputs(part, "self_attn.q_proj") for part in parts]
    assert [place for run in queries for place in run] == list(range(num_heads * HEAD_DIM))
    assert [inputs(part, "self_attn.o_proj") for part in parts] == queries
    for part, own in zip(parts, queries, strict=True):
        keys = outputs(part, "self_attn.k_proj")
        assert keys == outputs(part, "self_attn.v_proj")
        assert part.config.num_heads * HEAD_DIM == len(own) and part.config.num_kv_heads * HEAD_DIM == len(keys)
        assert part.config.num_heads % part.config.num_kv_heads == 0
        shared = part.config.num_heads // part.config.num_kv_heads
        for place, query in enumerate(own):
            key = keys[place // HEAD_DIM // shared * HEAD_DIM]
            assert query // HEAD_DIM // (num_heads // num_kv_heads) == key // HEAD_DIM


@pytest.mark.parametrize(("mlp", "size"), [(1536, 2), (1536, 4), (96, 2), (96, 4), (100, 3), (11008, 8), (344, 4)])
def test_the_mlp_is_shared_out_at_borders_of_groups_where_it_has_such(mlp: int, size: int) -> None:
    parts = parts_of(model(8, 8, mlp), size)
    own = [outputs(part, "mlp.gate_proj") for part in parts]
    assert [place for run in own for place in run] == list(range(mlp))
    assert [inputs(part, "mlp.down_proj") for part in parts] == own
    assert [len(run) for run in own] == [part.config.intermediate_size for part in parts]
    if mlp == 1536:
        assert all(run[0] % 128 == 0 for run in own)


def test_linears_that_are_packed_are_cut_in_each_of_their_parts() -> None:
    first, second = parts_of(model(4, 2, 64), 2)
    size = HEAD_DIM
    qkv = [place for run in ((0, 2 * size), (4 * size, 5 * size), (6 * size, 7 * size)) for place in range(*run)]
    assert outputs(first, "self_attn.qkv_proj") == qkv
    assert outputs(second, "mlp.gate_up_proj") == [*range(32, 64), *range(96, 128)]


def test_every_expert_is_cut_and_the_router_is_whole() -> None:
    config = replace(model(4, 4), experts=ExpertsConfig(8, 2, 64, True, ()))
    first, second = parts_of(config, 2)
    assert outputs(second, "mlp.experts.3.w1") == list(range(32, 64))
    assert inputs(first, "mlp.experts.7.down_proj") == list(range(32))
    assert second.linear("layers.0.mlp.gate") is None
    assert second.config.experts is not None and second.config.experts.inner_size == 32


def test_one_rank_has_all() -> None:
    config = model(9, 3)
    part = RankPart(config, 0, 1)
    assert part.config == config
    assert part.linear("layers.0.self_attn.q_proj") is None and part.linear("whatever") is None


@pytest.mark.parametrize(
    ("config", "size", "named"),
    [
        (model(9, 3), 10, "10 ranks are more than the model's 9 attention heads"),
        (model(8, 8, 3), 4, "an MLP of 3"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused(config: ModelConfig, size: int, named: str) -> None:
    with pytest.raises(CutError, match=named):
        parts_of(config, size)


def test_a_linear_that_nobody_has_said_how_to_cut_is_refused() -> None:
    with pytest.raises(CutError, match=r"'layers\.0\.attn\.new_proj' is not served on 2 ranks"):
        RankPart(model(4, 4), 0, 2).linear("layers.0.attn.new_proj")


def test_uneven_shares_differ_by_one() -> None:
    assert [split(10, 4, index) for index in range(4)] == [(0, 3), (3, 6), (6, 8), (8, 10)]
