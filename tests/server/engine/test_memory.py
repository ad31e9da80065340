from types import SimpleNamespace
from typing import Any

import pytest

from loraplex_server.config import EngineConfig
from loraplex_server.engine import memory
from loraplex_server.engine.memory import Limits, NotEnoughMemory, num_bytes_of, settle_limits
from loraplex_server.machine import Machine

BLOCK_BYTES = 1000


def settle(max_positions: int = 1024, **settings: Any) -> Limits:
    model = SimpleNamespace(max_positions=max_positions)
    return settle_limits(EngineConfig(**settings), model, BLOCK_BYTES)  # type: ignore[arg-type]  # the one field asked


def free_memory(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(memory, "look_at_machine", lambda: Machine(num_cores=1, memory_bytes=num_bytes))


def test_the_cache_takes_its_share_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free_memory(monkeypatch, 100 * BLOCK_BYTES)
    limits = settle(kv_memory_fraction=0.5)
    assert (limits.num_kv_blocks, limits.kv_bytes) == (50, 50 * BLOCK_BYTES)
    assert (limits.max_total_tokens, limits.max_input_tokens) == (50 * 16, 50 * 16 - 1)


def test_it_takes_no_more_than_all_sequences_together_could_use(monkeypatch: pytest.MonkeyPatch) -> None:
    free_memory(monkeypatch, 10**12)
    assert settle(max_batch_size=3, max_total_tokens=33).num_kv_blocks == 3 * 3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_kv_blocks": 7}, 7),
        ({"max_batch_total_tokens": 100}, 7),
        ({"num_kv_blocks": 7, "max_batch_total_tokens": 160}, 7),
    ],
)
def test_a_size_that_was_asked_for_is_taken_without_looking_at_the_memory(
    settings: dict[str, int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_memory(monkeypatch, 0)
    assert settle(**settings).num_kv_blocks == expected


def test_a_request_is_never_longer_than_the_model_reads_unless_rope_is_scaled() -> None:
    assert settle(64, num_kv_blocks=100, max_total_tokens=500).max_total_tokens == 64
    scaled = settle(64, num_kv_blocks=100, max_total_tokens=500, rope_scaling="dynamic", rope_factor=4.0)
    assert scaled.max_total_tokens == 256


def test_the_input_leaves_room_for_one_token() -> None:
    assert settle(64, num_kv_blocks=100, max_input_tokens=64).max_input_tokens == 63
    assert settle(64, num_kv_blocks=100, max_input_tokens=10).max_input_tokens == 10


def test_a_promise_that_the_cache_cannot_keep_is_refused_with_its_flags() -> None:
    assert settle(num_kv_blocks=4, max_total_tokens=64).max_total_tokens == 64
    with pytest.raises(NotEnoughMemory, match=r"room for 64 tokens, less than --max-total-tokens 65.*--kv-memory"):
        settle(num_kv_blocks=4, max_total_tokens=65)


def test_a_gpu_refuses_more_blocks_than_it_has_left_and_names_its_own_flags() -> None:
    model = SimpleNamespace(max_positions=1024)

    def settle_gpu(**settings: Any) -> Limits:
        return settle_limits(EngineConfig(**settings), model, BLOCK_BYTES, 9 * BLOCK_BYTES)  # type: ignore[arg-type]

    assert settle_gpu().num_kv_blocks == settle_gpu(num_kv_blocks=9).num_kv_blocks == 9
    for settings in ({"num_kv_blocks": 10}, {"max_batch_total_tokens": 145}):
        with pytest.raises(NotEnoughMemory, match=r"10 KV blocks of 16 tokens.* --num-kv-blocks"):
            settle_gpu(**settings)
    with pytest.raises(NotEnoughMemory, match="--cuda-memory-fraction"):
        settle_gpu(max_total_tokens=145)


def test_the_chunk_of_a_prompt_depends_on_the_device_unless_it_was_given() -> None:
    assert (EngineConfig().prefill_tokens, EngineConfig(device="cuda").prefill_tokens) == (512, 2048)
    assert EngineConfig(device="cuda", max_batch_prefill_tokens=7).prefill_tokens == 7


def test_no_memory_at_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    free_memory(monkeypatch, BLOCK_BYTES)
    with pytest.raises(NotEnoughMemory, match="--kv-memory-fraction"):
        settle()


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("4GiB", 4 * 2**30), ("512 MiB", 2**29), ("1.5kb", 1500), ("100", 100), ("0.25", 250), (".5", 500), ("1.0", 1000)],
)
def test_a_budget_is_bytes_with_a_unit_or_a_share(text: str, num_bytes: int) -> None:
    assert num_bytes_of(text, 1000, "--flag") == num_bytes


@pytest.mark.parametrize("text", ["", "much", "-1", "4 giga", "1.5.2GiB", "50%"])
def test_what_is_no_budget_is_refused_with_the_flag(text: str) -> None:
    with pytest.raises(NotEnoughMemory, match="--flag"):
        num_bytes_of(text, 1000, "--flag")
