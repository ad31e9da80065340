"""What one step does, in plain numbers: decided by rank 0, obeyed by every rank."""

from typing import Literal

import msgspec

from loraplex_models.adapters.merge_recipe import MergeRecipe
from loraplex_server.messages import SamplingParams

FUTURE_TOKEN = -1
"""Stands in a plan for the token that its row chose last: a step in flight has it, and nobody has read it yet."""


class AdapterOp(msgspec.Struct, frozen=True, kw_only=True):
    """Move one adapter between the tiers, before the step's forward pass.

    host_load starts reading `path`, or making `merge`, in the background, device_load starts bringing weights from host
    memory to the device; each rank reports their ends. slot_load puts what has come to the device into `slot`. Those
    that are done at once cost no copy.
    """

    kind: Literal["host_load", "host_evict", "device_load", "slot_load", "slot_clear"]
    digest: str
    path: str = ""
    merge: MergeRecipe | None = None
    slot: int = -1


class RowStart(msgspec.Struct, frozen=True, kw_only=True):
    """A sequence enters a row: how it samples, and its tokens so far: its prompt, and after a preemption its output."""

    row: int
    sampling: SamplingParams
    token_ids: list[int]
    num_output_tokens: int


class ScheduledSequence(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence's part of the step: compute `token_ids` at positions start, start + 1, …

    A token may be the FUTURE_TOKEN. `row` names the sequence's line in the tables that each rank keeps.
    `new_block_ids` are appended to the row's block table, which a RowStart of the same step has emptied. With
    `samples`, the last of the tokens gives the next token. `target_ids` are the tokens whose log-probabilities are
    wanted from the logits of this chunk, for requests that ask for prompt log-probabilities: the i-th follows the i-th
    token of the chunk.
    """

    row: int
    token_ids: list[int]
    start: int
    new_block_ids: list[int]
    slot: int  # adapter slot, -1 for the base
    samples: bool
    target_ids: list[int] = []
    num_base_tokens: int = 0  # so many of the tokens, from the first on, are the base's: an adapter that still sleeps


class StepPlan(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One step. Decodes come first, then chunks of prompts, each ordered by adapter slot."""

    step_id: int
    sequences: list[ScheduledSequence] = []
    num_decodes: int = 0
    adapter_ops: list[AdapterOp] = []
    row_starts: list[RowStart] = []
    row_ends: list[int] = []  # rows given back since the last step, in case they start again in this one: done first
