"""Frames: memory in pieces of one size, of which an adapter has as many as its tensors fill; plain numbers, no torch.

Why frames and not ranges of any length: after any history of loads and evictions n free frames hold any adapter of n
frames, so whoever counts bytes in whole frames never finds that they fit and cannot be had. The price is what packing
leaves empty, a few per cent where a frame holds several of the largest rank pages. Only a tensor longer than a frame (a
copy of the head, say) needs neighbours; such runs are taken from the other end of the memory.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from loraplex_kernels.copies import Fence

Place = tuple[int, int]  # one of the adapter's frames, and an offset in it in bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """Where an adapter's pieces lie in its frames. Frames may lie anywhere, but for runs of neighbours at the end."""

    places: tuple[Place, ...]  # of the pieces, in the order they were given
    num_loose: int
    runs: tuple[int, ...]  # lengths of runs of neighbours, which follow the loose frames

    @property
    def num_frames(self) -> int:
        """All frames of the adapter."""
        return self.num_loose + sum(self.runs)


def pack(sizes: Sequence[int], frame_bytes: int) -> Layout:
    """Pack pieces of these sizes, first fit by falling size; no piece crosses a frame's end, unless it is longer."""
    places: dict[int, Place] = {}
    ends: list[int] = []  # how far each loose frame is filled
    runs: list[int] = []
    long: list[int] = []
    first, last_size = 0, -1
    for piece in sorted(range(len(sizes)), key=lambda piece: -sizes[piece]):
        size = sizes[piece]
        if size > frame_bytes:
            long.append(piece)
            runs.append(-(-size // frame_bytes))
            continue
        if size != last_size:
            first, last_size = 0, size
        # A frame too full for one piece is so for the next of the same size.
        while first < len(ends) and ends[first] + size > frame_bytes:
            first += 1
        if first == len(ends):
            ends.append(0)
        places[piece] = (first, ends[first])
        ends[first] += size
    frame = len(ends)
    for piece, length in zip(long, runs, strict=True):
        places[piece] = (frame, 0)
        frame += length
    return Layout(tuple(places[piece] for piece in range(len(sizes))), len(ends), tuple(runs))


class FreeFrames:
    """Which of a memory's frames nobody has, and what may still be reading them. To be called by one thread at a time.

    Neighbours are handed out where there are enough of them: an adapter whose frames are neighbours is copied at once.
    """

    def __init__(self, num_frames: int) -> None:
        self.num_frames = num_frames
        self._runs: list[tuple[int, int]] = [(0, num_frames)] if num_frames else []  # start and end, ascending
        self._fences: dict[int, Fence] = {}  # of frames that were given back and may still be in use

    @property
    def num_free(self) -> int:
        """Frames that nobody has."""
        return sum(end - start for start, end in self._runs)

    def take(self, layout: Layout) -> tuple[tuple[int, ...], list[Fence]] | None:
        """Take the frames of a layout, None where there are not enough of them or of neighbours.

        Nothing may be written into them before all the fences that come with them have passed.
        """
        runs = list(self._runs)
        neighbours: dict[int, range] = {}
        for index in sorted(range(len(layout.runs)), key=lambda index: -layout.runs[index]):
            length = layout.runs[index]
            found = next((run for run in reversed(runs) if run[1] - run[0] >= length), None)
            if found is None:
                return None
            place = runs.index(found)
            start, end = found
            neighbours[index] = range(end - length, end)
            runs[place : place + 1] = [(start, end - length)] if end - length > start else []
        loose = _take_loose(runs, layout.num_loose)
        if loose is None:
            return None
        self._runs = runs
        frames = (*loose, *(frame for index in range(len(layout.runs)) for frame in neighbours[index]))
        self._forget_passed()
        return frames, list(dict.fromkeys(self._fences.pop(frame) for frame in frames if frame in self._fences))

    def give(self, frames: Iterable[int], fence: Fence | None = None) -> None:
        """Give frames back; what was launched before may use them until the fence has passed."""
        frames = sorted(frames)
        if fence is not None:
            self._fences |= dict.fromkeys(frames, fence)
        starts = [frame for frame, before in zip(frames, [-2, *frames], strict=False) if frame != before + 1]
        ends = [frame + 1 for frame, after in zip(frames, [*frames[1:], -2], strict=False) if frame + 1 != after]
        for start, end in zip(starts, ends, strict=True):
            self._insert(start, end)

    def check_integrity(self) -> None:
        """Assert that free runs are in order, apart, and within the memory; for tests."""
        assert all(0 <= start < end <= self.num_frames for start, end in self._runs)
        assert all(before[1] < after[0] for before, after in pairwise(self._runs))

    def _insert(self, start: int, end: int) -> None:
        place = bisect_left(self._runs, (start, end))
        assert place == len(self._runs) or end <= self._runs[place][0], "a frame was given back twice"
        assert place == 0 or self._runs[place - 1][1] <= start, "a frame was given back twice"
        if place < len(self._runs) and self._runs[place][0] == end:
            end = self._runs.pop(place)[1]
        if place and self._runs[place - 1][1] == start:
            place -= 1
            start = self._runs.pop(place)[0]
        self._runs.insert(place, (start, end))

    def _forget_passed(self) -> None:
        passed = {fence: fence.query() for fence in set(self._fences.values())}
        self._fences = {frame: fence for frame, fence in self._fences.items() if not passed[fence]}


def _take_loose(runs: list[tuple[int, int]], count: int) -> list[int] | None:
    """Take `count` frames out of `runs`, in place: from the shortest run that has them all, else from the longest."""
    taken: list[int] = []
    while len(taken) < count:
        missing = count - len(taken)
        enough = [run for run in runs if run[1] - run[0] >= missing]
        if not runs:
            return None
        run = min(enough or runs, key=lambda run: run[1] - run[0] if enough else run[0] - run[1])
        start, end = run
        stop = min(end, start + missing)
        taken += range(start, stop)
        place = runs.index(run)
        runs[place : place + 1] = [(stop, end)] if stop < end else []
    return taken
