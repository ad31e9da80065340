"""Which running sequences give way to one that was passed over for too long."""

from collections.abc import Sequence as Sequences

from loraplex_server.engine.fair_queue import FairQueue, Lane
from loraplex_server.engine.sequence import Sequence

# A sequence gives way only after it has generated so many tokens in this turn: every turn is of use.
MIN_TURN_TOKENS = 16


def adapter_to_free(
    running: Sequences[Sequence], queue: FairQueue, lane: Lane
) -> tuple[str | None, Sequences[Sequence]]:
    """The adapter whose place the lane's adapter is to take, and all sequences that run with it.

    It is the one with the fewest sequences, none of a tenant that was served less than the lane's. None: there is no
    such adapter. The empty string: no adapter is in use at all, only idle ones could be in the way.
    """
    by_digest: dict[str, list[Sequence]] = {}
    for sequence in running:
        if sequence.request.adapter_digest is not None:
            by_digest.setdefault(sequence.request.adapter_digest, []).append(sequence)
    if not by_digest:
        return "", []
    least = queue.served(lane.tenant)
    candidates = [d for d, runs in by_digest.items() if all(queue.served(s.tenant) >= least for s in runs)]
    if not candidates:
        return None, []
    digest = min(candidates, key=lambda d: len(by_digest[d]))
    return digest, by_digest[digest]


def row_to_free(running: Sequences[Sequence], queue: FairQueue, lane: Lane) -> Sequences[Sequence]:
    """The youngest sequence of the tenant that was served most, if that is more than the lane's; else none."""
    victim = max(running, key=lambda s: (queue.served(s.tenant), s.order), default=None)
    if victim is None or queue.served(victim.tenant) <= queue.served(lane.tenant):
        return []
    return [victim]


def has_had_its_turn(sequence: Sequence, now: float, turn_s: float) -> bool:
    """Whether a running sequence has run for `turn_s`, and to some effect."""
    num_generated = len(sequence.token_ids) - sequence.num_tokens_at_start
    return now - sequence.running_since >= turn_s and num_generated >= MIN_TURN_TOKENS
