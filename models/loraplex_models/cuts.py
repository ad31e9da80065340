"""Which part of each linear one rank holds: column-parallel linears are cut by outputs, row-parallel ones by inputs."""

from dataclasses import dataclass, replace

from loraplex_models.config import ROUTER, ModelConfig

Run = tuple[int, int]  # start and stop, of elements of one dimension

# How each linear of the checkpoint is cut, by the last two words of its name: the outputs, or the inputs, that belong
# to a rank's attention heads or to its share of the MLP.
CUT_OUTPUTS = {
    "self_attn.q_proj": ("queries",),
    "self_attn.k_proj": ("keys",),
    "self_attn.v_proj": ("keys",),
    "self_attn.qkv_proj": ("queries", "keys", "keys"),
    "mlp.gate_proj": ("mlp",),
    "mlp.up_proj": ("mlp",),
    "mlp.gate_up_proj": ("mlp", "mlp"),
    "mlp.c_fc": ("mlp",),
    "experts.gate_proj": ("expert",),
    "experts.up_proj": ("expert",),
    "experts.w1": ("expert",),
    "experts.w3": ("expert",),
}
CUT_INPUTS = {
    "self_attn.o_proj": ("queries",),
    "mlp.down_proj": ("mlp",),
    "mlp.c_proj": ("mlp",),
    "experts.down_proj": ("expert",),
    "experts.w2": ("expert",),
}
# Every rank sends tokens to the same experts, of each of which it has a part.
WHOLE = (ROUTER,)
# The MLP is cut where a vector register or a group of a quantised weight begins, if there are enough of such places.
MLP_UNITS = (128, 64, 32, 16, 8)


class CutError(ValueError):
    """The model cannot be cut over that many ranks; the message says why."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A rank's part of one dimension of `size` elements: some runs of it, one after the other."""

    size: int
    runs: tuple[Run, ...]

    @property
    def part_size(self) -> int:
        """How many elements the rank holds."""
        return sum(stop - start for start, stop in self.runs)


@dataclass(frozen=True, slots=True)
class LinearCut:
    """A rank's part of one linear: of its outputs or of its inputs; None where it has all of them."""

    outputs: Cut | None
    inputs: Cut | None
    has_bias: bool  # the bias of a linear that is cut by inputs is added by one rank only


class RankPart:
    """One rank's part of a model. `config` is that of the part: its heads and its share of the MLP.

    Heads are cut by groups that share a key head, evenly or nearly so; where there are fewer key heads than ranks,
    several ranks have the same one, each with its own queries. Raises CutError.
    """

    def __init__(self, whole: ModelConfig, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.vocab = split(whole.vocab_size, size, rank)
        heads, key_heads = _heads(whole, rank, size)
        mlp = _mlp(whole.intermediate_size, rank, size)
        head_dim = whole.head_dim
        # Ranks that have the same key heads are neighbours.
        self.is_first_with_keys = rank == 0 or _heads(whole, rank - 1, size)[1] != key_heads
        self._cuts = {
            "queries": Cut(whole.num_heads * head_dim, ((heads[0] * head_dim, heads[1] * head_dim),)),
            "keys": Cut(whole.num_kv_heads * head_dim, ((key_heads[0] * head_dim, key_heads[1] * head_dim),)),
            "mlp": Cut(whole.intermediate_size, (mlp,)),
        }
        experts = whole.experts
        if experts is not None:
            inner = _mlp(experts.inner_size, rank, size)
            self._cuts["expert"] = Cut(experts.inner_size, (inner,))
            experts = replace(experts, inner_size=inner[1] - inner[0])
        self.config = replace(
            whole,
            num_heads=heads[1] - heads[0],
            num_kv_heads=key_heads[1] - key_heads[0],
            intermediate_size=mlp[1] - mlp[0],
            experts=experts,
        )

    @property
    def queries(self) -> Cut:
        """The rank's part of all queries of a token."""
        return self._cuts["queries"]

    @property
    def keys(self) -> Cut:
        """The rank's part of all keys of a token; others may have the same."""
        return self._cuts["keys"]

    @property
    def expert(self) -> Cut | None:
        """The rank's part of every expert's inner units; None where the model has no experts."""
        return self._cuts.get("expert")

    def linear(self, module: str) -> LinearCut | None:
        """The part of a linear, `layers.0.self_attn.q_proj` or with more before it; None when it is held whole.

        Raises CutError for a linear that nobody has said how to cut.
        """
        if self.size == 1:
            return None
        name = _kind(module)
        if name in WHOLE:
            return None
        if name in CUT_OUTPUTS:
            return LinearCut(self._joined(CUT_OUTPUTS[name]), None, has_bias=True)
        if name in CUT_INPUTS:
            return LinearCut(None, self._joined(CUT_INPUTS[name]), has_bias=self.rank == 0)
        raise CutError(f"'{module}' is not served on {self.size} ranks: leave --num-shard at 1")

    def _joined(self, kinds: tuple[str, ...]) -> Cut:
        """The cut of several dimensions that are packed into one."""
        runs: list[Run] = []
        offset = 0
        for kind in kinds:
            cut = self._cuts[kind]
            runs += [(offset + start, offset + stop) for start, stop in cut.runs]
            offset += cut.size
        return Cut(offset, tuple(runs))


def is_cut_by_inputs(module: str) -> bool:
    """Whether each rank has some inputs of this linear, so that their products must be summed."""
    return _kind(module) in CUT_INPUTS


def _kind(module: str) -> str:
    *_, block, parent, name = ("", "", *module.split("."))
    return f"experts.{name}" if block == "experts" else f"{parent}.{name}"


def split(count: int, num_parts: int, index: int) -> Run:
    """The `index`-th of `num_parts` runs of `count` things, as even as can be, the longer ones first."""
    size, longer = divmod(count, num_parts)
    start = index * size + min(index, longer)
    return start, start + size + (index < longer)


def _heads(config: ModelConfig, rank: int, size: int) -> tuple[Run, Run]:
    """A rank's query heads and key heads; the first are a multiple of the second."""
    queries_per_key = config.num_heads // config.num_kv_heads
    if config.num_kv_heads >= size:
        keys = split(config.num_kv_heads, size, rank)
        return (keys[0] * queries_per_key, keys[1] * queries_per_key), keys
    for head in range(config.num_kv_heads):
        first, stop = split(size, config.num_kv_heads, head)
        if rank < stop:
            break
    if stop - first > queries_per_key:
        raise CutError(
            f"{size} ranks are more than the model's {config.num_heads} attention heads can be shared out to: "
            "lower --num-shard"
        )
    queries = split(queries_per_key, stop - first, rank - first)
    offset = head * queries_per_key
    return (offset + queries[0], offset + queries[1]), (head, head + 1)


def _mlp(size: int, rank: int, num_ranks: int) -> Run:
    uneven = next((unit for unit in MLP_UNITS if size % unit == 0 and size // unit >= 4 * num_ranks), 1)
    unit = next((unit for unit in MLP_UNITS if size % (unit * num_ranks) == 0), uneven)
    if size // unit < num_ranks:
        raise CutError(f"an MLP of {size} cannot be shared out to {num_ranks} ranks: lower --num-shard")
    start, stop = split(size // unit, num_ranks, rank)
    return start * unit, stop * unit
