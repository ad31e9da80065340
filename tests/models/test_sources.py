from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_stand_in import Hub, Repository, running_hub

from loraplex_models.sources import (
    AdapterItem,
    SourceError,
    SourceForbidden,
    SourceFormatError,
    SourceNotFound,
    SourceUnavailable,
    adapter_id_problem,
    parse_lora_adapters,
    resolve_adapter,
    resolve_model,
)

MODEL_FILES = {
    "config.json": b"{}", "generation_config.json": b"{}", "tokenizer.json": b"{}", "chat_template.jinja": b"x",
    "model.safetensors": b"weights", "pytorch_model.bin": b"pickle", "consolidated.safetensors": b"twice",
    "original/model.safetensors": b"twice", "training_args.bin": b"pickle", "README.md": b"card",
}  # fmt: skip
ADAPTER_FILES = {
    "adapter_config.json": b"{}", "adapter_model.safetensors": b"weights" * 1000, "adapter_model.bin": b"pickle",
    "training_args.bin": b"pickle", "optimizer.pt": b"pickle", "tokenizer.json": b"{}", "README.md": b"card",
}  # fmt: skip


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        hub.repositories["acme/model"] = Repository(MODEL_FILES, revisions=("main", "v2"))
        hub.repositories["acme/adapter"] = Repository(ADAPTER_FILES)
        yield hub


@pytest.fixture
def arguments(hub: Hub, tmp_path: Path) -> dict[str, Any]:
    return {"cache_dir": str(tmp_path / "cache"), "endpoint": hub.endpoint, "progress": False}


def adapter(location: str, **fields: Any) -> AdapterItem:
    return AdapterItem(**({"adapter_id": "a", "location": location, "revision": None, "is_local": False} | fields))


def error_of(arguments: dict[str, Any], model_id: str = "acme/model", **more: Any) -> SourceError:
    with pytest.raises(SourceError) as caught:
        resolve_model(model_id, **arguments, **more)
    assert "\n" not in str(caught.value)
    return caught.value


# Models


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    source = resolve_model(str(tmp_path))
    assert (source.path, source.source, source.revision) == (str(tmp_path), "local", None)


def test_a_hub_id_gives_the_files_of_a_commit(hub: Hub, arguments: dict[str, Any]) -> None:
    source = resolve_model("acme/model", **arguments)
    assert (source.source, source.revision) == ("hub", hub.repositories["acme/model"].commit)
    names = {path.name for path in Path(source.path).iterdir()}
    assert names == {
        "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors",
    }  # fmt: skip
    assert (Path(source.path) / "model.safetensors").read_bytes() == b"weights"


def test_weights_are_fetched_only_when_asked_for(hub: Hub, arguments: dict[str, Any]) -> None:
    resolve_model("acme/model", weights=False, **arguments)
    assert not any(name.endswith(".safetensors") for name in hub.downloaded())


def test_pickles_are_never_fetched(hub: Hub, arguments: dict[str, Any]) -> None:
    resolve_model("acme/model", **arguments)
    resolve_adapter(adapter("acme/adapter"), **arguments)
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in hub.downloaded())


@pytest.mark.parametrize(
    ("model_id", "revision"), [("acme/model@v2", None), ("acme/model", "v2"), ("acme/model@v2", "v2")]
)
def test_a_revision_may_stand_in_either_place(
    model_id: str, revision: str | None, hub: Hub, arguments: dict[str, Any]
) -> None:
    resolve_model(model_id, revision, **arguments)
    assert "GET /api/models/acme/model/revision/v2" in hub.requests


def test_two_different_revisions_are_refused(arguments: dict[str, Any]) -> None:
    assert isinstance(error_of(arguments, "acme/model@v2", revision="main"), SourceFormatError)


def test_a_second_time_nothing_is_fetched_again(hub: Hub, arguments: dict[str, Any]) -> None:
    first = resolve_model("acme/model", **arguments)
    hub.requests.clear()
    assert resolve_model("acme/model", **arguments) == first
    assert hub.downloaded() == set()


def test_an_unknown_repository_is_not_found(arguments: dict[str, Any]) -> None:
    error = error_of(arguments, "acme/modle")
    assert isinstance(error, SourceNotFound)
    assert "'acme/modle'" in str(error)
    assert "spelling" in str(error)
    assert "HF_TOKEN" in str(error)


def test_an_unknown_revision_is_not_found(arguments: dict[str, Any]) -> None:
    error = error_of(arguments, "acme/model@v9")
    assert isinstance(error, SourceNotFound)
    assert "'v9'" in str(error)


def test_a_gated_repository_is_forbidden_and_the_token_is_not_shown(hub: Hub, arguments: dict[str, Any]) -> None:
    hub.repositories["acme/model"] = Repository(MODEL_FILES, gated=True, token="right")
    without = error_of(arguments)
    assert isinstance(without, SourceForbidden)
    assert "HF_TOKEN" in str(without)
    wrong = error_of(arguments, token="hf_secret")
    assert isinstance(wrong, SourceForbidden)
    assert "hf_secret" not in str(wrong)
    assert resolve_model("acme/model", token="right", **arguments).source == "hub"


def test_a_refusal_is_forbidden(hub: Hub, arguments: dict[str, Any]) -> None:
    hub.repositories["acme/model"] = Repository(MODEL_FILES, token="right")
    assert isinstance(error_of(arguments, token="wrong"), SourceForbidden)


@pytest.mark.parametrize("status", [500, 503])
def test_a_hub_in_trouble_is_unavailable(status: int, hub: Hub, arguments: dict[str, Any]) -> None:
    hub.status = status
    error = error_of(arguments)
    assert isinstance(error, SourceUnavailable)
    assert "'acme/model'" in str(error)
    assert str(status) in str(error)


def test_a_hub_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with running_hub() as gone:
        endpoint = gone.endpoint
    arguments = {"cache_dir": str(tmp_path), "endpoint": endpoint, "progress": False}
    assert isinstance(error_of(arguments), SourceUnavailable)


def test_a_hub_in_trouble_does_not_hide_what_is_in_the_cache(hub: Hub, arguments: dict[str, Any]) -> None:
    first = resolve_model("acme/model", **arguments)
    hub.status = 503
    assert resolve_model("acme/model", **arguments) == first


def test_offline_takes_the_cache_and_asks_nobody(hub: Hub, arguments: dict[str, Any]) -> None:
    first = resolve_model("acme/model", **arguments)
    hub.requests.clear()
    assert resolve_model("acme/model", offline=True, **arguments) == first
    assert hub.requests == []


def test_offline_without_a_cache_says_so(hub: Hub, arguments: dict[str, Any]) -> None:
    error = error_of(arguments, offline=True)
    assert isinstance(error, SourceUnavailable)
    assert "HF_HUB_OFFLINE" in str(error)
    assert hub.requests == []


def test_a_download_that_is_cut_off_is_never_taken_for_complete(
    hub: Hub, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)  # between the hub's own retries
    hub.cut_downloads_at = 3000
    with pytest.raises(SourceUnavailable):
        resolve_adapter(adapter("acme/adapter"), **arguments)
    assert not list(Path(arguments["cache_dir"]).rglob("snapshots/*/adapter_model.safetensors"))
    hub.cut_downloads_at = None
    source = resolve_adapter(adapter("acme/adapter"), **arguments)
    content = (Path(source.path) / "adapter_model.safetensors").read_bytes()
    assert content == ADAPTER_FILES["adapter_model.safetensors"]


@pytest.mark.parametrize("model_id", ["/no/such/folder", "./nothing", "../nothing", "~/nothing/here", "a/b/c"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(model_id: str, hub: Hub, arguments: dict[str, Any]) -> None:
    assert isinstance(error_of(arguments, model_id), SourceNotFound)
    assert hub.requests == []


@pytest.mark.parametrize("model_id", ["", "a b", "acme/model@", "x" * 10_000, "a\0b", "acme/../x", "acme--x/y..z"])
def test_a_name_that_cannot_be_is_refused(model_id: str, hub: Hub, arguments: dict[str, Any]) -> None:
    assert isinstance(error_of(arguments, model_id), SourceFormatError | SourceNotFound)
    assert hub.requests == []


def test_a_cache_that_cannot_be_written_is_unavailable(arguments: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert isinstance(error_of(arguments), SourceUnavailable)


def test_progress_is_shown_when_wanted(hub: Hub, arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    resolve_model("acme/model", **arguments)
    assert capsys.readouterr().err == ""
    resolve_adapter(adapter("acme/adapter"), **(arguments | {"progress": True}))
    assert "Fetching 2 files" in capsys.readouterr().err


# Adapters


def test_an_adapters_own_two_files_are_fetched(hub: Hub, arguments: dict[str, Any]) -> None:
    source = resolve_adapter(adapter("acme/adapter"), **arguments)
    assert {path.name for path in Path(source.path).iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert source.revision == hub.repositories["acme/adapter"].commit


def test_an_adapter_may_be_in_a_sub_folder(hub: Hub, arguments: dict[str, Any]) -> None:
    files = {f"{folder}/{name}": content for name, content in ADAPTER_FILES.items() for folder in ("one", "two")}
    hub.repositories["acme/many"] = Repository(files)
    source = resolve_adapter(adapter("acme/many/two"), **arguments)
    assert (Path(source.path).name, source.revision) == ("two", hub.repositories["acme/many"].commit)
    assert hub.downloaded() == {"two/adapter_config.json", "two/adapter_model.safetensors"}
    with pytest.raises(SourceNotFound, match="'three'"):
        resolve_adapter(adapter("acme/many/three"), **arguments)


def test_a_repository_without_an_adapter_shows_what_it_is(hub: Hub, arguments: dict[str, Any]) -> None:
    hub.repositories["acme/run"] = Repository({f"checkpoint-5/{name}": b"{}" for name in ADAPTER_FILES})
    assert (Path(resolve_adapter(adapter("acme/run"), **arguments).path) / "checkpoint-5").is_dir()
    assert (Path(resolve_adapter(adapter("acme/model"), **arguments).path) / "config.json").is_file()


def test_a_local_adapter_is_a_folder(tmp_path: Path) -> None:
    source = resolve_adapter(adapter(str(tmp_path), is_local=True))
    assert (source.path, source.source) == (str(tmp_path), "local")
    with pytest.raises(SourceNotFound, match="no folder"):
        resolve_adapter(adapter(str(tmp_path / "nothing"), is_local=True))


# The list of adapters


def test_the_list_takes_the_four_forms() -> None:
    text = " org/repo , org/other@v2, name=/path/dir ,x=rel/dir@rev,,"
    assert parse_lora_adapters(text) == [
        AdapterItem("org/repo", "org/repo", None, False),
        AdapterItem("org/other", "org/other", "v2", False),
        AdapterItem("name", "/path/dir", None, True),
        AdapterItem("x", "rel/dir", "rev", True),
    ]
    assert parse_lora_adapters("") == parse_lora_adapters(" , ") == []


@pytest.mark.parametrize("item", ["a=b=c", "a/b@c@d", "a=", "=b", "@v", "a@", "a=b@", "a@v=b=c"])
def test_an_item_of_another_form_is_repeated_as_tgi_says_it(item: str) -> None:
    with pytest.raises(SourceFormatError, match=r"^Invalid LoRA adapter format: ") as caught:
        parse_lora_adapters(f"ok/ok,{item}")
    assert str(caught.value).endswith(f": {item}")


@pytest.mark.parametrize("path", ["/path/dir", "./dir", "../dir", "~/dir"])
def test_a_path_needs_a_name(path: str) -> None:
    with pytest.raises(SourceFormatError, match=r"name=") as caught:
        parse_lora_adapters(path)
    assert path in str(caught.value)


def test_a_folder_that_exists_needs_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "repo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceFormatError, match="name=org/repo"):
        parse_lora_adapters("org/repo")


@pytest.mark.parametrize("text", ["a=x,a=y", "org/a,org/a@v2", "org/a,org/a=/x"])
def test_a_name_given_twice_is_refused(text: str) -> None:
    with pytest.raises(SourceFormatError, match="given twice"):
        parse_lora_adapters(text)


@pytest.mark.parametrize("item", ["a b", "org/re po", "..=x", "a\0=x", "-=x", "org//x", "org/../x"])
def test_a_name_that_no_request_could_use_is_refused(item: str) -> None:
    with pytest.raises(SourceFormatError):
        parse_lora_adapters(item)


@pytest.mark.parametrize("adapter_id", ["alice", "org/repo", "org/repo/sub", "v1.2_x-y", "日本", "two words", "a:b"])
def test_names_and_hub_ids_are_ids(adapter_id: str) -> None:
    assert adapter_id_problem(adapter_id) is None


@pytest.mark.parametrize(
    "adapter_id",
    [
        "", "../x", "a/../../b", "/etc", "~root", "%2e%2e/x", "a\\b", "a\0b", "a\nb", "x" * 513, "-", ".", "a//b", "a/",
        "\ud800",
    ],
)  # fmt: skip
def test_ways_out_of_a_folder_and_odd_texts_are_not_ids(adapter_id: str) -> None:
    assert adapter_id_problem(adapter_id) is not None
