"""`loraplex adapters check`: yes or no with what a person needs, for good adapters and for broken ones."""

import json
from pathlib import Path

import pytest
import torch
from adapter_files import base_fields, config_fields, lora_tensors, write_adapter
from broken_adapters import BROKEN, make_broken
from hub_stand_in import Repository, running_hub

from loraplex.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"
# A description of the demo's model, for its adapters.
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(base_fields()))  # no weights: none are needed
    return folder


def check(capsys: pytest.CaptureFixture[str], place: str, base: Path, *flags: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["adapters", "check", place, "--model-id", str(base), *flags])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_an_adapter_that_fits_is_described(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = check(capsys, str(write_adapter(tmp_path / "a")), base)
    assert code == 0
    assert said.startswith(f"yes: '{tmp_path / 'a'}' can be served on '{base}'\n")
    size = sum(tensor.nbytes for tensor in lora_tensors().values())
    for line in (
        "rank      4",
        "scaling   2 (alpha 8)",
        "modules   down_proj, q_proj: 4 linears in 2 layers",
        "stored as F32",
        f"size      {size:,} bytes",
        "note      trained on 'acme/tiny', served on",
    ):
        assert f"\n  {line}" in said


def test_ranks_and_scalings_that_differ_are_shown_as_ranges(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = lora_tensors(4, ("self_attn.q_proj",)) | lora_tensors(2, ("mlp.down_proj",))
    write_adapter(tmp_path / "a", config_fields(rank_pattern={"down_proj": 2}), tensors)
    said = check(capsys, str(tmp_path / "a"), base)[1]
    assert "rank      2 to 4" in said and "scaling   2 to 4" in said


@pytest.mark.parametrize("name", ["pirate", "json", "shout"])
def test_the_example_adapters_fit_the_demos_model(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    code, said, _ = check(capsys, str(EXAMPLES / name), tmp_path)
    assert code == 0 and "30 layers" in said, said


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_adapter_is_a_no_that_says_what_to_mend(
    kind: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = make_broken(kind, tmp_path / "broken")
    code, said, _ = check(capsys, str(tmp_path / "broken"), base)
    assert code == 1
    verdict, reason = said.splitlines()
    assert verdict.startswith(f"no: '{tmp_path / 'broken'}' cannot be served on")
    for word in broken.words:
        assert word in reason


def test_a_rank_above_the_limit_names_the_flag(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = check(capsys, str(write_adapter(tmp_path / "a")), base, "--max-lora-rank", "2")
    assert code == 1 and "--max-lora-rank 4" in said and "above a limit" in said


def test_a_pickle_is_checked_where_it_is_trusted(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_broken("only a pickle", tmp_path / "old")
    torch.save(lora_tensors(), tmp_path / "old" / "adapter_model.bin")
    assert check(capsys, str(tmp_path / "old"), base)[0] == 1
    assert check(capsys, str(tmp_path / "old"), base, "--trust-pickle-adapters")[0] == 0


def test_a_hub_id_is_checked_too(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_adapter(tmp_path / "a")
    with running_hub() as hub:
        hub.repositories["acme/a"] = Repository({file.name: file.read_bytes() for file in folder.iterdir()})
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        flags = ("--huggingface-hub-cache", str(tmp_path / "cache"))
        assert check(capsys, "acme/a", base, *flags)[0] == 0
        code, _, error = check(capsys, "acme/none", base, *flags)
        assert code == 1 and "acme/none" in error


def test_what_is_not_there_is_an_error(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = check(capsys, "/nothing/here", base)
    assert code == 1 and "/nothing/here" in error
