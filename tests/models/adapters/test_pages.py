"""The allocator of rank pages against plain arithmetic, and under random loads and unloads."""

import random

import pytest
from adapter_files import NUM_LAYERS, SHAPES

from loraplex_models.adapters.pages import Footprint, PagePool, chunk_size, footprint, page_bytes, pages_for

SIZES = page_bytes(SHAPES, NUM_LAYERS, 4)


def need(rank: int, kinds: tuple[str, ...] = tuple(SHAPES), dense_elements: int = 0) -> Footprint:
    return footprint(tuple((kind, rank) for kind in kinds), dense_elements, SIZES, 4)


@pytest.mark.parametrize(("rank", "pages"), [(1, 1), (8, 1), (9, 2), (16, 2), (17, 3), (64, 8), (512, 64)])
def test_a_rank_is_rounded_up_to_pages_of_eight_rows(rank: int, pages: int) -> None:
    assert pages_for(rank) == pages
    by_hand = sum(2 * pages * 8 * (num_in + num_out) * 4 for num_in, num_out in SHAPES.values())
    assert need(rank).num_bytes == by_hand


def test_ranks_8_and_64_side_by_side_take_one_to_eight() -> None:
    pool = PagePool(2**24, chunk_size(SIZES))
    pool.allocate("large", need(64))
    pool.allocate("small", need(8))
    assert pool.bytes_of("large") == 8 * pool.bytes_of("small") > 0


def test_an_adapter_takes_pages_of_its_own_classes_only() -> None:
    assert need(8, ("self_attn.o_proj",)).num_bytes == SIZES["self_attn.o_proj"] == 2 * 8 * (32 + 32) * 4


def test_a_class_takes_as_many_pages_as_its_highest_rank() -> None:
    mixed = footprint((("self_attn.q_proj", 4), ("self_attn.v_proj", 20)), 0, SIZES, 4)
    assert mixed.num_bytes == 3 * SIZES["qkv"]


def test_dense_tensors_count() -> None:
    assert need(8, dense_elements=100).num_bytes == need(8).num_bytes + 400


def test_what_is_freed_is_there_again() -> None:
    chunk = chunk_size(SIZES)
    pool = PagePool(3 * chunk, chunk)
    assert pool.could_ever_hold(need(8)) and not pool.could_ever_hold(need(512))
    first = pool.allocate("a", need(8))
    assert not pool.can_hold(need(512))
    pool.free("a")
    assert (pool.used_bytes, pool.reserved_bytes, pool.owners) == (0, 0, [])
    assert pool.allocate("b", need(8)) == first


def test_pages_of_one_size_can_follow_those_of_another() -> None:
    chunk = chunk_size(SIZES)
    pool = PagePool(chunk, chunk)
    pool.allocate("a", Footprint({100: 3}))
    assert not pool.can_hold(Footprint({200: 1}))
    pool.free("a")
    assert pool.can_hold(Footprint({200: 1}))


@pytest.mark.parametrize("seed", range(5))
def test_random_loads_and_unloads_never_share_a_page_and_end_at_nothing(seed: int) -> None:
    draw = random.Random(seed)
    chunk = chunk_size(SIZES)
    pool, twin = PagePool(40 * chunk, chunk), PagePool(40 * chunk, chunk)
    held: dict[str, Footprint] = {}
    for number in range(400):
        if held and draw.random() < 0.45:
            owner = draw.choice(list(held))
            pool.free(owner)
            twin.free(owner)
            del held[owner]
        kinds = tuple(draw.sample(list(SHAPES), draw.randint(1, len(SHAPES))))
        wanted = need(draw.choice((1, 4, 8, 16, 31, 64)), kinds, draw.choice((0, 0, 50)))
        if pool.can_hold(wanted):
            places = pool.allocate(str(number), wanted)
            assert twin.allocate(str(number), wanted) == places
            assert {size: len(taken) for size, taken in places.items()} == wanted.pages
            assert all(0 <= offset <= chunk - size for size, taken in places.items() for _, offset in taken)
            held[str(number)] = wanted
        pool.check_integrity()
        assert pool.used_bytes == sum(item.num_bytes for item in held.values())
    for owner in list(held):
        pool.free(owner)
    pool.check_integrity()
    assert (pool.used_bytes, pool.reserved_bytes) == (0, 0)
