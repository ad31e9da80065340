"""A request inside the engine: its tokens and progress."""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from loraplex_server.engine.block_manager import activation_hash, hash_block, root_hash
from loraplex_server.engine.step import FUTURE_TOKEN, ScheduledSequence
from loraplex_server.messages import GenerateRequest, TopLogprob


class Status(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One request's tokens and progress; only the scheduler moves it.

    `token_ids` are prompt and output as far as they are known; `num_pending_tokens` more are chosen by steps in flight.
    `num_computed_tokens` of both have keys and values in `block_ids`, or will have them after the steps in flight.
    `block_hashes` name the full blocks of `token_ids`, as far as they were asked for; the first
    `num_committed_blocks` of them can be found by other sequences.
    """

    request: GenerateRequest
    order: int  # of arrival; the oldest is the last to be preempted
    tenant: str  # with whom it shares its turn
    token_ids: list[int]
    num_prompt_tokens: int
    adapter_start: int = 0  # tokens before this position are the base's: an activated adapter is still asleep
    num_pending_tokens: int = 0
    num_computed_tokens: int = 0
    last_step: int = 0  # the last step that it is in
    needs_known_tokens: bool = False  # what it may choose depends on values that the host must have, see new_sequence
    num_cached_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_committed_blocks: int = 0
    row: int = -1
    slot: int = -1
    status: Status = Status.WAITING
    first_run_time: float | None = None
    is_cold: bool = False  # its adapter was not on the device when it arrived
    waiting_since: float = 0.0  # the scheduler's clock
    running_since: float = 0.0
    num_tokens_at_start: int = 0  # when it began to run, last time
    num_charged_tokens: int = 0  # tokens of the prompt (and after a preemption of the output) that were paid for
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[list[TopLogprob]] = field(default_factory=list)

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, as far as they are known."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens still without keys and values: 1 when decoding."""
        return len(self.token_ids) + self.num_pending_tokens - self.num_computed_tokens

    @property
    def can_run_ahead(self) -> bool:
        """Whether another token may be planned while some are pending. Which one is the last, the count tells."""
        num_planned = self.num_output_tokens + self.num_pending_tokens
        return not self.needs_known_tokens and num_planned < self.request.sampling.max_new_tokens

    def plan(self, step_id: int, count: int, new_block_ids: list[int]) -> ScheduledSequence:
        """Put the next `count` tokens into a step, and count what there will be after it.

        Only one that stands alone may be pending.
        """
        start, num_prompt = self.num_computed_tokens, self.num_prompt_tokens
        end = start + count
        is_future = start == len(self.token_ids)
        wants_targets = self.prompt_logprobs is not None and start < num_prompt - 1
        planned = ScheduledSequence(
            row=self.row,
            token_ids=[FUTURE_TOKEN] if is_future else self.token_ids[start:end],
            start=start,
            new_block_ids=new_block_ids,
            slot=self.slot,
            samples=count == self.num_uncomputed_tokens,
            target_ids=self.token_ids[start + 1 : min(end + 1, num_prompt)] if wants_targets else [],
            num_base_tokens=max(0, min(count, self.adapter_start - start)) if self.adapter_start else 0,
        )
        self.num_computed_tokens = end
        self.num_pending_tokens += planned.samples
        self.last_step = step_id
        return planned

    def hashes(self, num_blocks: int, block_size: int) -> list[bytes]:
        """The names of the first `num_blocks` full blocks; tokens are only ever appended, so they stay valid.

        Blocks before the start of an activated adapter have the base's names: they are the same.
        """
        known = self.block_hashes
        digest = self.request.adapter_digest
        for index in range(len(known), num_blocks):
            parent = known[-1] if known else root_hash(None if self.adapter_start else digest, self.request.cache_salt)
            if digest and self.adapter_start and index == self.adapter_start // block_size:
                parent = activation_hash(parent, digest, self.adapter_start)
            known.append(hash_block(parent, self.token_ids[index * block_size : (index + 1) * block_size]))
        return known[:num_blocks]


def last_occurrence(token_ids: Tokens[int], wanted: Tokens[int]) -> int | None:
    """Where `wanted` (not empty) begins for the last time; None if it does not occur."""
    for start in range(len(token_ids) - len(wanted), -1, -1):
        if token_ids[start] == wanted[0] and list(token_ids[start : start + len(wanted)]) == list(wanted):
            return start
    return None


def new_sequence(request: GenerateRequest, order: int, invocation_token_ids: Tokens[int] = ()) -> Sequence:
    """A waiting sequence for a request.

    A grammar's mask and a watermark's list are worked out by the host from the tokens before: a sequence with one of
    them is in no step before its last token was read. It runs in every second step then, and costs the others nothing.

    With invocation tokens its adapter acts from their last occurrence in the prompt on, as in PEFT; where they do not
    occur the sequence is one of the base.
    """
    adapter_start = last_occurrence(request.prompt_token_ids, invocation_token_ids) if invocation_token_ids else 0
    if adapter_start is None:
        request = msgspec.structs.replace(request, adapter_digest=None)
    sampling = request.sampling
    return Sequence(
        request=request,
        order=order,
        tenant=(request.adapter_id or "") if request.tenant is None else request.tenant,
        token_ids=list(request.prompt_token_ids),
        num_prompt_tokens=len(request.prompt_token_ids),
        adapter_start=adapter_start or 0,
        needs_known_tokens=sampling.guide is not None or sampling.watermark,
        prompt_logprobs=[None] if sampling.prompt_logprobs else None,
        prompt_top_logprobs=[[]] if sampling.num_prompt_logprobs else [],
    )
