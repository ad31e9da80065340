from loraplex_server.engine.adapters.manager import AdapterManager
from loraplex_server.messages import AdapterSpec


def spec(digest: str) -> AdapterSpec:
    return AdapterSpec(adapter_id=f"name-{digest}", digest=digest, path=f"folder/{digest}", rank=8, num_bytes=100)


def manager(num_slots: int = 2, budget: int = 1000, digests: str = "abc") -> AdapterManager:
    made = AdapterManager(num_slots, budget)
    for digest in digests:
        made.register(spec(digest))
    return made


def ops(made: AdapterManager) -> list[tuple[str, str, int]]:
    return [(op.kind, op.digest, op.slot) for op in made.take_ops()]


def ready(made: AdapterManager, digest: str) -> None:
    assert made.expect(digest) is None
    made.loaded(digest, 100, None)


def test_an_expected_adapter_is_loaded_once_however_many_wait():
    made = manager()
    assert made.expect("a") is None
    assert made.expect("a") is None
    assert ops(made) == [("host_load", "a", -1)]
    assert not made.can_acquire("a")
    made.loaded("a", 100, None)
    assert made.can_acquire("a")
    assert made.acquire("a") == made.acquire("a")
    assert made.num_pins == 2


def test_an_unknown_version_is_refused_with_a_reason():
    assert "not known" in (manager().expect("z") or "")


def test_a_pinned_slot_is_never_given_to_another_adapter():
    made = manager(num_slots=1)
    ready(made, "a")
    ready(made, "b")
    slot = made.acquire("a")
    assert not made.can_acquire("b")
    made.release("a")
    assert made.can_acquire("b")
    assert made.acquire("b") == slot
    assert ops(made)[-2:] == [("slot_clear", "a", slot), ("slot_load", "b", slot)]


def test_the_slot_used_longest_ago_is_evicted_first():
    made = manager(num_slots=2)
    for digest in "ab":
        ready(made, digest)
        made.acquire(digest)
        made.release(digest)
    ready(made, "a")
    made.acquire("a")
    made.release("a")
    ready(made, "c")
    made.acquire("c")
    assert ("slot_clear", "b") in [(kind, digest) for kind, digest, _ in ops(made)]


def test_host_memory_beyond_the_budget_is_given_back_from_idle_adapters_only():
    made = manager(num_slots=3, budget=200)
    for digest in "ab":
        ready(made, digest)
        made.acquire(digest)
    made.release("a")
    made.take_ops()
    ready(made, "c")
    assert ("host_evict", "a", -1) in ops(made)
    assert made.can_acquire("c")
    assert not made.is_loaded("a")


def test_a_failed_load_is_tried_again_for_the_next_request():
    made = manager()
    made.expect("a")
    made.loaded("a", 0, "file gone")
    assert made.error_of("a") == "file gone"
    made.unexpect("a")
    made.take_ops()
    made.expect("a")
    assert made.error_of("a") is None
    assert ops(made) == [("host_load", "a", -1)]


def test_a_forgotten_adapter_serves_its_running_sequence_and_then_goes():
    made = manager()
    ready(made, "a")
    slot = made.acquire("a")
    made.take_ops()
    made.forget("a")
    assert ops(made) == []
    made.release("a")
    assert ops(made) == [("slot_clear", "a", slot), ("host_evict", "a", -1)]
    assert made.expect("a") is not None


def test_an_adapter_forgotten_while_it_loads_goes_when_the_load_has_ended():
    made = manager()
    made.expect("a")
    made.unexpect("a")
    made.forget("a")
    made.loaded("a", 100, None)
    assert ("host_evict", "a", -1) in ops(made)
    assert made.num_loading == 0


def test_a_preempted_sequence_waits_again_and_its_slot_may_be_lent():
    made = manager(num_slots=1)
    ready(made, "a")
    made.acquire("a")
    made.release("a", will_return=True)
    ready(made, "b")
    assert made.can_acquire("b")
    made.acquire("b")
    made.release("b")
    assert made.can_acquire("a")
