"""Ways in which an adapter's files can be wrong, each with what a refusal must say: for the server and the command."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from adapter_files import CONFIG_FILE, PREFIX, WEIGHTS_FILE, config_fields, lora_tensors, write_adapter


@dataclass(frozen=True)
class Broken:
    """`make` writes the adapter into a folder; a refusal has this type and these words."""

    row: str  # of faults.md
    error_type: str
    words: tuple[str, ...]
    make: Callable[[Path], None]


def _config(**overrides: Any) -> Callable[[Path], None]:
    return lambda folder: _write(folder, config_fields(**overrides))


def _config_text(text: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _write(folder)
        (folder / CONFIG_FILE).write_text(text)

    return make


def _tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    return lambda folder: _write(folder, None, change(lora_tensors()))


def _weights(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _write(folder)
        (folder / WEIGHTS_FILE).write_bytes(change((folder / WEIGHTS_FILE).read_bytes()))

    return make


def _without(file: str, **others: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _write(folder)
        (folder / file).unlink()
        for name, content in others.items():
            (folder / name.replace("__", ".")).write_bytes(content)

    return make


def _write(folder: Path, config: dict[str, Any] | None = None, tensors: dict[str, torch.Tensor] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter(folder, config, tensors)


def _with_value(value: float) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[FIRST_B][0, 0] = value
        return tensors

    return change


def _header(value: Any) -> Callable[[bytes], bytes]:
    raw = json.dumps(value).encode()
    return lambda content: len(raw).to_bytes(8, "little") + raw + b"\0" * 8


FIRST = f"{PREFIX}layers.0.self_attn.q_proj"
FIRST_A, FIRST_B = f"{FIRST}.lora_A.weight", f"{FIRST}.lora_B.weight"
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


INVALID, UNSUPPORTED, INCOMPATIBLE = "adapter_invalid", "adapter_unsupported", "adapter_incompatible"
_nan = float("nan")
NAME_TWICE = b'{"a":1,"a":2}'


def _raw(header: bytes) -> Callable[[bytes], bytes]:
    return lambda content: len(header).to_bytes(8, "little") + header


def _renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def _in_bfloat16(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


BROKEN: dict[str, Broken] = {
    # Configs
    "no config": Broken("06", INVALID, (CONFIG_FILE, "not the folder of a PEFT adapter"), _without(CONFIG_FILE)),
    "a full model": Broken("06", INVALID, ("full model, not an adapter",), _without(CONFIG_FILE, config__json=b"{}")),
    "an empty config": Broken("06", INVALID, (CONFIG_FILE,), _config_text("")),
    "a config that is not JSON": Broken("06", INVALID, (CONFIG_FILE,), _config_text("{")),
    "a config that is a list": Broken("06", INVALID, (CONFIG_FILE,), _config_text("[]")),
    "rank 0": Broken("06", INVALID, ("r ", "0"), _config(r=0)),
    "rank -1": Broken("06", INVALID, ("r ", "-1"), _config(r=-1)),
    "rank as text": Broken("06", INVALID, ("r ", "'8'"), _config(r="8")),
    "a huge rank": Broken("06", INVALID, ("rank", "1000000000"), _config(r=10**9)),
    "alpha NaN": Broken("06", INVALID, ("lora_alpha",), _config_text(json.dumps(config_fields(lora_alpha=_nan)))),
    "wrong field type": Broken("06", INVALID, ("rank_pattern",), _config(rank_pattern=[1])),
    # Features that are not served
    "IA3": Broken("07", UNSUPPORTED, ("IA3",), _config(peft_type="IA3")),
    "prefix tuning": Broken("07", UNSUPPORTED, ("PREFIX_TUNING",), _config(peft_type="PREFIX_TUNING")),
    "layer replication": Broken("07", UNSUPPORTED, ("layer_replication",), _config(layer_replication=[[0, 1]])),
    "PiSSA not converted": Broken(
        "07", UNSUPPORTED, ("init_lora_weights", "pissa"), _config(init_lora_weights="pissa")
    ),
    "QALoRA": Broken("07", UNSUPPORTED, ("use_qalora",), _config(use_qalora=True)),
    # Files
    "only a pickle": Broken(
        "08", UNSUPPORTED, ("adapter_model.bin", "convert"), _without(WEIGHTS_FILE, adapter_model__bin=b"x")
    ),
    "an empty file": Broken("09", INVALID, ("0 bytes",), _weights(lambda content: b"")),
    "seven bytes": Broken("09", INVALID, ("7 bytes",), _weights(lambda content: content[:7])),
    "a huge header": Broken(
        "09", INVALID, ("claims",), _weights(lambda content: (2**63).to_bytes(8, "little") + content)
    ),
    "a header that is not JSON": Broken("09", INVALID, ("header",), _weights(_raw(b"hello"))),
    "a cut file": Broken("09", INVALID, ("cut off",), _weights(lambda content: content[:-100])),
    "an unknown dtype": Broken("09", INVALID, ("dtype",), _weights(_header({"a": ENTRY | {"dtype": "F31"}}))),
    "overlapping tensors": Broken("09", INVALID, ("overlap",), _weights(_header({"a": ENTRY, "b": ENTRY}))),
    "offsets out of the file": Broken(
        "09", INVALID, ("cut off",), _weights(_header({"a": ENTRY | {"data_offsets": [80, 88]}}))
    ),
    "a name twice": Broken("09", INVALID, ("twice",), _weights(_raw(NAME_TWICE))),
    "very many tensors": Broken("09", INVALID, ("tensors",), _weights(_header({f"{i}": ENTRY for i in range(60_000)}))),
    # Tensors
    "empty tensors of ZeRO-3": Broken(
        "10", INVALID, ("ZeRO-3", FIRST_B), _tensors(lambda t: t | {FIRST_B: torch.zeros(0)})
    ),
    "A without B": Broken("10", INVALID, (FIRST_A,), _tensors(lambda t: {k: v for k, v in t.items() if k != FIRST_B})),
    "ranks of A and B differ": Broken(
        "10", INVALID, ("rank",), _tensors(lambda t: t | {FIRST_B: t[FIRST_B][:, :2].contiguous()})
    ),
    "a rank that the config does not say": Broken("10", INVALID, ("rank", "4"), _config(r=8)),
    "another model's size": Broken(
        "11", INCOMPATIBLE, ("expected", "found", "acme/tiny"), _tensors(lambda t: t | {FIRST_A: torch.ones(4, 64)})
    ),
    "another model's layers": Broken(
        "11", INCOMPATIBLE, ("layer 7", "layers 0 to"), _tensors(_renamed("layers.1", "layers.7"))
    ),
    "another architecture": Broken(
        "12", INCOMPATIBLE, ("expected names like",), _tensors(_renamed("proj.", "c_attn."))
    ),
    "some names that do not fit": Broken(
        "12", INCOMPATIBLE, ("does not have", "wrong_proj"), _tensors(_renamed("down_proj", "wrong_proj"))
    ),
    "NaN": Broken("14", INVALID, ("not finite", FIRST_B), _tensors(_with_value(_nan))),
    "infinity": Broken("14", INVALID, ("not finite", FIRST_B), _tensors(_with_value(float("-inf")))),
    "NaN in bfloat16": Broken(
        "14", INVALID, ("not finite", FIRST_B), _tensors(lambda t: _in_bfloat16(_with_value(_nan)(t)))
    ),
}


def make_broken(kind: str, folder: Path) -> Broken:
    """Write the broken adapter of this kind into `folder`."""
    broken = BROKEN[kind]
    broken.make(folder)
    return broken
