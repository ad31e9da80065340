import json
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from loraplex.flags import Settings
from loraplex.launch_error import LaunchError
from loraplex.resolve import check_address, check_state, resolve
from loraplex_server.adapter_state import AdapterState
from loraplex_server.config import AdapterSourceConfig, ApiConfig, LaunchConfig, ServeConfig

EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"
# The shape of the base model that the example adapters were trained on.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "vocab_size": 49152,
    "dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    return folder


def settings(model: Path | str, **launch: object) -> Settings:
    return Settings(launch=LaunchConfig(model_id=str(model), **launch), serve=ServeConfig())  # type: ignore[arg-type]


def test_a_local_model_and_its_adapters_are_found_and_checked(model: Path) -> None:
    facts = resolve(settings(model, lora_adapters=(f"pirate={EXAMPLES / 'pirate'}", f"j={EXAMPLES / 'json'}")))
    assert facts.path == str(model)
    assert (facts.model_id, facts.revision, facts.weight_bytes) == (str(model), None, 100)
    assert [(adapter.adapter_id, adapter.rank) for adapter in facts.adapters] == [("pirate", 8), ("j", 16)]
    assert facts.adapters[0].digest != facts.adapters[1].digest


def test_the_served_name_takes_the_place_of_the_model_id(model: Path) -> None:
    assert resolve(settings(model, served_model_name="small")).model_id == "small"


def test_the_override_gives_the_files_and_the_id_stays(model: Path) -> None:
    facts = resolve(settings("org/name", weights_cache_override=str(model)))
    assert (facts.path, facts.model_id) == (str(model), "org/name")


def test_every_bad_adapter_is_listed_in_one_line(model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    adapters = (f"good={EXAMPLES / 'shout'}", f"first={empty}", f"second={tmp_path / 'missing'}")
    with pytest.raises(LaunchError) as refusal:
        resolve(settings(model, lora_adapters=adapters))
    text = str(refusal.value)
    assert "'first'" in text
    assert "'second'" in text
    assert "'good'" not in text
    assert "\n" not in text


def test_an_adapter_above_the_highest_rank_is_refused(model: Path) -> None:
    asked = settings(model, lora_adapters=(f"j={EXAMPLES / 'json'}",))
    engine = asked.serve.engine
    low = replace(engine, adapters=replace(engine.adapters, max_lora_rank=8))
    with pytest.raises(LaunchError, match="16"):
        resolve(replace(asked, serve=replace(asked.serve, engine=low)))


def test_a_list_that_cannot_be_read_names_the_item(model: Path) -> None:
    with pytest.raises(LaunchError, match="a=b=c"):
        resolve(settings(model, lora_adapters=("a=b=c",)))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_that_is_no_model_is_refused(model: Path, missing: str) -> None:
    (model / missing).unlink()
    with pytest.raises(LaunchError, match=r"config\.json|safetensors"):
        resolve(settings(model))


def test_a_missing_folder_is_refused(model: Path) -> None:
    shutil.rmtree(model)
    with pytest.raises(LaunchError, match="model"):
        resolve(settings(model))


def test_a_free_address_is_accepted_and_a_taken_one_named() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        listener.listen()
        with pytest.raises(LaunchError, match=f"127.0.0.1:{port}.*in use"):
            check_address(ApiConfig(hostname="127.0.0.1", port=port))
    check_address(ApiConfig(hostname="127.0.0.1", port=port))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"name": "both", "merged_adapters": {"ids": ["a"], "weights": [1, 2]}}', "1 ids and 2 weights"),
        ('{"name": "both", "merged_adapters": {"ids": "a"}}', "`merged_adapters.ids`"),
        ('{"name": "both"}', "`merged_adapters`: Field required"),
        ('{"name": "both", "merged_adapters": {"ids": ["a"], "weights": [1]}, "path": "x"}', "`path`: Extra"),
        ('{"name": "../x", "merged_adapters": {"ids": ["a"], "weights": [1]}}', "an adapter's name must"),
        ('{"name": "b", "merged_adapters": {"ids": ["a"], "weights": [1]}}', "'b' is given twice"),
        ('{"name": ', "no valid JSON"),
        ("pirate=/elsewhere", "'pirate' is given twice"),
    ],
)
def test_a_mistake_in_the_list_of_adapters_ends_the_start(model: Path, tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "list").write_text(f"a=/data/a\nb=/data/b\n{line}\n")
    wanted = Settings(
        launch=LaunchConfig(model_id=str(model), lora_adapters=(f"pirate={EXAMPLES / 'pirate'}",)),
        serve=ServeConfig(adapter_sources=AdapterSourceConfig(adapter_list=str(tmp_path / "list"))),
    )
    with pytest.raises(LaunchError, match=re.escape(words)):
        resolve(wanted)


def test_a_folder_for_names_that_cannot_be_used_is_refused_before_the_start(tmp_path: Path) -> None:
    def with_state(folder: Path) -> Settings:
        return Settings(
            launch=LaunchConfig(),
            serve=ServeConfig(adapter_sources=AdapterSourceConfig(adapter_state=str(folder))),
        )

    check_state(with_state(tmp_path / "new" / "folder"))
    check_state(with_state(tmp_path / "new" / "folder"))  # it was given back
    other = AdapterState(tmp_path / "taken")
    other.open()
    with pytest.raises(LaunchError, match=r"taken is used by another server.*--adapter-state"):
        check_state(with_state(tmp_path / "taken"))
    other.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match=r"file cannot be used: .*--adapter-state"):
        check_state(with_state(tmp_path / "file"))


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(LaunchError, match=r"192\.0\.2\.1"):
        check_address(ApiConfig(hostname="192.0.2.1", port=3988))
