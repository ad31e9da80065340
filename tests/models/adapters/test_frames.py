"""How adapters are packed into frames, and that free frames are had by one at a time and never too early."""

import itertools
import random

import pytest

from loraplex_models.adapters.frames import FreeFrames, Layout, pack


class Hand:
    """A fence that the test lets pass."""

    def __init__(self) -> None:
        self.has_passed = False

    def query(self) -> bool:
        return self.has_passed

    def synchronize(self) -> None:
        raise AssertionError("the arena never waits")


@pytest.mark.parametrize("seed", range(20))
def test_pieces_lie_apart_within_frames_and_little_is_left_empty(seed: int) -> None:
    draw = random.Random(seed)
    kinds = [draw.randint(1, 25) for _ in range(draw.randint(1, 5))]
    sizes = [draw.choice([*kinds, draw.randint(101, 350)] if draw.random() < 0.05 else kinds) for _ in range(200)]
    layout = pack(sizes, 100)
    spans = sorted((frame * 100 + offset, size) for (frame, offset), size in zip(layout.places, sizes, strict=True))
    for (start, size), (following, _) in itertools.pairwise(spans):
        assert start + size <= following
    for (frame, offset), size in zip(layout.places, sizes, strict=True):
        assert (offset == 0 and frame >= layout.num_loose) if size > 100 else offset + size <= 100
    short = sum(size for size in sizes if size <= 100)
    assert layout.num_loose <= short / 75 + 1
    assert sorted(layout.runs) == sorted(-(-size // 100) for size in sizes if size > 100)


def test_nothing_takes_no_frames() -> None:
    assert pack([], 100) == Layout((), 0, ())
    assert FreeFrames(0).take(Layout((), 0, ())) == ((), [])


@pytest.mark.parametrize("seed", range(10))
def test_frames_have_one_owner_and_come_with_the_fences_of_the_last(seed: int) -> None:
    draw = random.Random(seed)
    free = FreeFrames(64)
    owned: list[tuple[int, ...]] = []
    fence_of: dict[int, Hand] = {}
    for _ in range(400):
        if owned and draw.random() < 0.5:
            frames = owned.pop(draw.randrange(len(owned)))
            fence = Hand() if draw.random() < 0.7 else None
            if fence is not None:
                fence_of |= dict.fromkeys(frames, fence)
            free.give(frames, fence)
        else:
            layout = Layout((), draw.randint(0, 12), tuple(draw.sample([2, 3, 5], draw.choice([0, 0, 0, 1, 2]))))
            before = free.num_free
            found = free.take(layout)
            if found is None:
                # Loose frames are always to be had; only runs of neighbours may be missing.
                assert before < layout.num_frames or layout.runs
                assert free.num_free == before
                continue
            frames, fences = found
            assert len(frames) == layout.num_frames and free.num_free == before - len(frames)
            assert not {frame for other in owned for frame in other} & set(frames)
            first = layout.num_loose
            for length in layout.runs:
                assert frames[first : first + length] == tuple(range(frames[first], frames[first] + length))
                first += length
            pending = {fence_of.pop(frame) for frame in frames if frame in fence_of}
            assert {fence for fence in pending if not fence.has_passed} <= set(fences) <= pending
            owned.append(frames)
        for fence in set(fence_of.values()):
            fence.has_passed |= draw.random() < 0.2
        free.check_integrity()
    for frames in owned:
        free.give(frames)
    assert free.take(Layout((), 0, (64,))) is not None


def test_neighbours_are_taken_where_there_are_enough_and_the_shortest_run_first() -> None:
    free = FreeFrames(20)
    found = [free.take(Layout((), count, ())) for count in (4, 1, 3, 1)]
    first, _, second, _ = (frames for frames, _ in found if frames is not None)
    free.give(first)
    free.give(second)
    assert free.take(Layout((), 3, ())) == (second, [])
    assert free.take(Layout((), 4, ())) == (first, [])


def test_a_frame_given_back_twice_is_noticed() -> None:
    free = FreeFrames(4)
    frames, _ = free.take(Layout((), 2, ())) or ((), [])
    free.give(frames)
    with pytest.raises(AssertionError, match="given back twice"):
        free.give(frames[:1])
