import pytest

from loraplex_server.adapter_contents import AdapterContents
from loraplex_server.adapter_registry import AdapterRegistry
from loraplex_server.config import AdapterConfig
from loraplex_server.errors import AdapterNotFound, InvalidRequest
from loraplex_server.messages import AdapterSpec


def registry(*names: str) -> AdapterRegistry:
    sources = tuple(
        AdapterSpec(adapter_id=name, path=f"/adapters/{name}", digest=f"digest of {name}", rank=8, num_bytes=100)
        for name in names
    )
    return new_registry(*sources)


def new_registry(*sources: AdapterSpec) -> AdapterRegistry:
    return AdapterRegistry(AdapterConfig(sources=sources), AdapterContents(lambda message: None))


def test_a_known_id_gives_all_that_was_said_at_start() -> None:
    source = AdapterSpec(
        adapter_id="org/a", path="/p", digest="d", rank=16, num_bytes=7, source="hub", revision="c0ffee"
    )
    entry = new_registry(source).resolve("org/a")
    assert entry.choose("anybody").spec == source


def test_the_list_has_the_order_of_the_start() -> None:
    assert [entry.name for entry in registry("b", "a", "c").entries()] == ["b", "a", "c"]


def test_an_unknown_id_is_not_found_with_near_names() -> None:
    with pytest.raises(AdapterNotFound, match=r"adapter 'pirat' .*near names: pirate"):
        registry("pirate", "json", "shout").resolve("pirat")


def test_at_most_five_near_names_are_told() -> None:
    with pytest.raises(AdapterNotFound) as caught:
        registry(*(f"alice{i}" for i in range(20))).resolve("alice")
    assert str(caught.value).count("alice") == 1 + 5


def test_an_id_like_no_other_has_no_near_names() -> None:
    with pytest.raises(AdapterNotFound, match=r"not known to this server$"):
        registry("pirate").resolve("zzz")


def test_near_names_are_told_also_among_very_many() -> None:
    with pytest.raises(AdapterNotFound, match="near names: customer-07123,"):
        registry(*(f"customer-{i:05d}" for i in range(10_000))).resolve("customer-07123x")


def test_without_adapters_every_id_is_not_found() -> None:
    assert registry().entries() == []
    with pytest.raises(AdapterNotFound):
        registry().resolve("pirate")


@pytest.mark.parametrize("adapter_id", ["", "a\0b", "x" * 513, "../pirate", "/etc/passwd", "%2e%2e/x", "a\\b", "~root"])
def test_what_cannot_be_an_id_is_an_invalid_request(adapter_id: str) -> None:
    with pytest.raises(InvalidRequest, match="`adapter_id` must"):
        registry("pirate").resolve(adapter_id)
