"""Runs a model over scattered KV blocks, any mix of decodes and chunks in a step, and collects every token's logits."""

import random

import torch
from torch import Tensor

from loraplex_models.adapters.slots import AdapterSlots
from loraplex_models.decoder import CausalLM
from loraplex_models.forward import AttentionBatch, ForwardBatch


def random_tokens(count: int, seed: int = 0) -> list[int]:
    """Tokens of the tiny models' vocabulary."""
    return torch.randint(0, 512, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def true_logits(model: torch.nn.Module, tokens: list[int]) -> Tensor:
    """What a transformers model, or a peft model around one, gives for each token; [tokens, vocab]."""
    logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


class PagedModel:
    """Sequences of given tokens, computed in the steps that a test asks for; blocks come in random order."""

    def __init__(
        self, model: CausalLM, *, block_size: int = 4, num_blocks: int = 256, slots: AdapterSlots | None = None
    ) -> None:
        self.model = model
        self.slots = slots
        self.block_size = block_size
        self.cache = model.new_kv_cache(num_blocks, block_size)
        self._free = list(range(num_blocks))
        random.Random(7).shuffle(self._free)
        self._tokens: dict[str, list[int]] = {}
        self._slot: dict[str, int] = {}
        self._adapter_start: dict[str, int] = {}
        self._done: dict[str, int] = {}
        self._blocks: dict[str, list[int]] = {}
        self._logits: dict[str, list[Tensor]] = {}

    def add(self, name: str, tokens: list[int], slot: int = -1, *, adapter_start: int = 0) -> None:
        """Add a sequence; its tokens before `adapter_start` are the base's."""
        self._tokens[name], self._slot[name], self._adapter_start[name] = tokens, slot, adapter_start
        self._done[name], self._blocks[name], self._logits[name] = 0, [], []

    def logits(self, name: str) -> Tensor:
        return torch.cat(self._logits[name])

    def remaining(self, name: str) -> int:
        return len(self._tokens[name]) - self._done[name]

    def run_alone(self, name: str, chunk: int) -> Tensor:
        while self.remaining(name):
            self.step({name: min(chunk, self.remaining(name))})
        return self.logits(name)

    def step(self, counts: dict[str, int]) -> None:
        """Compute the next `counts[name]` tokens of each named sequence in one forward pass."""
        decodes = sorted((n for n in counts if counts[n] == 1), key=self._slot.__getitem__)
        names = decodes + sorted((n for n in counts if counts[n] > 1), key=self._slot.__getitem__)
        token_ids: list[int] = []
        positions: list[int] = []
        cells: list[int] = []
        starts, lengths = [0], []
        borders, slots = [0], []
        for name in names:
            first = self._done[name]
            last = first + counts[name]
            while len(self._blocks[name]) * self.block_size < last:
                self._blocks[name].append(self._free.pop())
            token_ids += self._tokens[name][first:last]
            positions += range(first, last)
            blocks = self._blocks[name]
            cells += [blocks[p // self.block_size] * self.block_size + p % self.block_size for p in range(first, last)]
            asleep = max(0, min(last, self._adapter_start[name]) - first)
            borders += [starts[-1] + asleep, len(token_ids)]
            slots += [-1, self._slot[name]]
            starts.append(len(token_ids))
            lengths.append(last)
            self._done[name] = last
        width = max(len(self._blocks[name]) for name in names)
        table = [self._blocks[name] + [0] * (width - len(self._blocks[name])) for name in names]
        lora = self.slots.route(borders, slots) if self.slots else None
        device = self.model.device
        batch = ForwardBatch(
            token_ids=torch.tensor(token_ids, device=device),
            positions=torch.tensor(positions, device=device),
            sample_rows=torch.arange(len(token_ids), device=device),
            attention=AttentionBatch(
                query_start=torch.tensor(starts, dtype=torch.int32, device=device),
                seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
                block_table=torch.tensor(table, dtype=torch.int32, device=device),
                slot_mapping=torch.tensor(cells, device=device),
                num_decodes=len(decodes),
                max_query_len=max(counts.values()),
                max_seq_len=max(lengths),
            ),
            lora=lora,
        )
        with torch.inference_mode():
            logits = self.model.forward(batch, self.cache)
        for i, name in enumerate(names):
            self._logits[name].append(logits[starts[i] : starts[i + 1]])

    def run_mixed(self, num_slots: int, seed: int = 3) -> tuple[dict[str, list[int]], dict[str, int]]:
        """Run sequences of the base and of all slots to their ends, in chunks and companies that are drawn.

        Returns each one's tokens, and its slot.
        """
        draw = random.Random(seed)
        tokens = {f"s{i}": random_tokens(length, seed=i) for i, length in enumerate((33, 1, 60, 18, 41, 25))}
        slots = {name: i % (num_slots + 1) - 1 for i, name in enumerate(tokens)}
        for name in tokens:
            self.add(name, tokens[name], slots[name])
        while waiting := [name for name in tokens if self.remaining(name)]:
            chosen = draw.sample(waiting, draw.randint(1, len(waiting)))
            self.step({name: min(draw.choice((1, 1, 2, 7, 30)), self.remaining(name)) for name in chosen})
        return tokens, slots
