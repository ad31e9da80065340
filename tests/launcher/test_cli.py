import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraplex import cli
from loraplex.foreign_flags import spread_lora_modules

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    """The exit code of a command line and what it said on stderr."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(args))
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--max-input-token", "--max-input-tokens"),
        ("--lora-adapter", "--lora-adapters"),
        ("--modelid", "--model-id"),
        ("--qzx", "--help"),
    ],
)
def test_an_unknown_flag_is_one_line_with_the_nearest_real_name(
    flag: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = run(capsys, flag, "3")
    assert code == 2
    assert flag in error
    assert nearest in error
    assert error.count("\n") == 1


def test_the_model_may_stand_without_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    code, error = run(capsys, "serve", "/no/such/model", "--port", "3985")
    assert code != 0 and "/no/such/model" in error
    code, error = run(capsys, "serve", "one", "--model-id", "other")
    assert code == 2 and "two models are given: one and --model-id other" in error


def test_a_bad_value_names_the_variable_it_came_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PORT", "eighty")
    code, error = run(capsys, "serve", "--model-id", "m")
    assert code == 2
    assert "environment variable PORT" in error


@pytest.mark.parametrize("word", [[], ["serve"]])
def test_serve_may_be_left_out(word: list[str], capsys: pytest.CaptureFixture[str], taken_port: int) -> None:
    code, error = run(capsys, *word, "--hostname", "127.0.0.1", "--port", str(taken_port), "--model-id", "no/model")
    assert code == 1
    assert f"127.0.0.1:{taken_port}" in error  # told before the model is looked for
    assert "in use" in error
    assert error.count("\n") == 1


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = run(capsys, "--model-id", str(tmp_path / "missing"), "--hostname", "127.0.0.1", "--port", "3987")
    assert code == 1
    assert "missing" in error
    assert error.count("\n") == 1


def test_the_report_of_the_machine_needs_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["--env"], ["env"], ["serve", "-e"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(args)
        assert ended.value.code in (0, None)
        assert "torch: " in capsys.readouterr().out


def test_the_demo_serves_its_own_model_only(capsys: pytest.CaptureFixture[str]) -> None:
    code, error = run(capsys, "demo", "--model-id", "m")
    assert code == 2
    assert "demo" in error


def test_vllms_list_of_modules_ends_at_the_next_flag() -> None:
    args = ["--lora-modules", "a=1", "b=2", "--port", "80"]
    assert spread_lora_modules(args) == ["--lora-modules", "a=1", "--lora-modules", "b=2", "--port", "80"]


def test_the_command_line_brings_neither_torch_nor_the_hub() -> None:
    roots = [str(REPOSITORY / root) for root in ("launcher", "server", "models", "quant", "kernels")]
    code = (
        f"import sys; sys.path[:0] = {roots!r}; import loraplex.cli; "
        "print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_an_adapter_of_another_form_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "mlx"
    source.mkdir()
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 4.0}}
    (source / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"model.layers.0.self_attn.q_proj.lora_a": torch.ones(8, 2)}
    save_file(tensors, source / "adapters.safetensors")
    code, error = run(capsys, "adapters", "convert", str(source), str(tmp_path / "new"))
    assert (code, "has only lora_a" in error, error.count("\n")) == (1, True, 1)
    save_file(tensors | {"model.layers.0.self_attn.q_proj.lora_b": torch.ones(2, 8)}, source / "adapters.safetensors")
    with pytest.raises(SystemExit) as ended:
        cli.main(["adapters", "convert", str(source), str(tmp_path / "new")])
    assert ended.value.code in (0, None)
    assert capsys.readouterr().out == "1 modules of MLX written as LoRA of rank 2\n"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
