"""How an adapter's tensors fit one base model: each is given its place, or the adapter is refused."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from loraplex_models.adapters.experts import ExpertEntry, expert_entry
from loraplex_models.adapters.lora_config import CONFIG_FILE, LoraConfig
from loraplex_models.adapters.lora_features import ENDS
from loraplex_models.adapters.pages import RankRows
from loraplex_models.adapters.refusal import ManifestError, shown, shown_names
from loraplex_models.adapters.tensor_header import TensorEntry
from loraplex_models.adapters.tensor_names import ModuleNames, SortedNames
from loraplex_models.config import ROUTER, ModelConfig

SERVED_DTYPES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}  # and the bytes of an element
# Full matrices of the embeddings, under all their names, and the side of a LoRA pair that is as long as the vocabulary.
VOCABULARY_TENSOR = re.compile(
    r"(^|\.)(embed_tokens|lm_head)\."
    r"((modules_to_save\.|original_module\.|base_layer\.)?((?!lora_)[^.]+\.)?weight$|lora_B|lora_embedding_A)"
)


@dataclass(frozen=True, slots=True)
class ModuleEntry:
    """One adapted linear: y += scaling · (B(A x) + bias of B), A [rank, in_features], B [out_features, rank].

    With `magnitude_name` (DoRA) each output of base and product together, but for the biases, is scaled so that its
    row of weights has that length. Where A (or B) is stored in blocks, it is the block-diagonal matrix of its rows in
    that many pieces.
    """

    a_name: str
    b_name: str
    rank: int
    scaling: float
    in_features: int
    out_features: int
    dtype: str  # of A, as safetensors names it
    magnitude_name: str | None = None
    b_bias_name: str | None = None
    a_blocks: int = 1
    b_blocks: int = 1


@dataclass(frozen=True, slots=True)
class EndEntry:
    """What an adapter does to embed_tokens or lm_head: a low-rank product, a whole matrix, or some tokens' rows.

    `base_copy_name` is a copy of the base's matrix, which must be what it claims to be.
    """

    product: ModuleEntry | None
    weight_name: str | None
    rows_name: str | None
    row_ids: tuple[int, ...]
    base_copy_name: str | None

    @property
    def changes(self) -> bool:
        """Whether it does anything."""
        return self.product is not None or self.weight_name is not None or self.rows_name is not None


class Fit:
    """One adapter against one base model; `take` gives the tensors their places and raises ManifestError."""

    def __init__(
        self,
        config: ModelConfig,
        shapes: Mapping[str, tuple[int, int]],
        lora: LoraConfig,
        tensors: Mapping[str, TensorEntry],
    ) -> None:
        vocabulary, hidden = config.vocab_size, config.hidden_size
        self._config = config
        self._lora = lora
        self._tensors = tensors
        self._shapes = {**shapes, "embed_tokens": (vocabulary, hidden), "lm_head": (hidden, vocabulary)}
        self._trained_on = f" (trained on {shown(lora.base_model_name)})" if lora.base_model_name else ""
        self._paths: list[str] = []
        self.modules: dict[str, ModuleEntry] = {}
        self.biases: dict[str, str] = {}
        self.ends: dict[str, EndEntry] = {}
        self.experts: list[ExpertEntry] = []

    def check_vocabulary(self) -> None:
        """Refuse matrices of another vocabulary first: their sizes say more than what else may be wrong."""
        for name, tensor in self._tensors.items():
            if not VOCABULARY_TENSOR.search(name) or len(tensor.shape) != 2:
                continue
            num_tokens = tensor.shape[1] if "lora_embedding_A" in name else tensor.shape[0]
            if num_tokens != self._config.vocab_size:
                raise ManifestError(
                    f"tensor {shown(name)} is for {num_tokens} tokens, the base model's vocabulary has"
                    f" {self._config.vocab_size}: trained with another vocabulary{self._trained_on}",
                    "adapter_incompatible",
                )

    def take(self, found: SortedNames) -> None:
        """Give every tensor its place; there must be some, and none without a place."""
        self._check_names(found)
        for name, module in found.modules.items():
            if name in ENDS:
                self._take_end(name, module)
            elif ".experts" in name:
                self.experts.append(expert_entry(name, module, self._config, self._lora, self._tensors))
                self._check_dtype(module.names["A"])
                self._check_dtype(module.names["B"])
            else:
                self._take_linear(name, module)
        if not (self.modules or self.biases or self.experts or any(end.changes for end in self.ends.values())):
            raise ManifestError("no tensor of the adapter changes the base model", "adapter_incompatible")
        if self._config.tie_embeddings:
            self._share_with_head()
        self._check_promises()

    @property
    def rank(self) -> int:
        """The highest of all products; 0 where there is none."""
        ranks = [entry.rank for entry in self._products().values()] + [pair.rank for pair in self.experts]
        return max(ranks, default=0)

    def num_bytes(self) -> int:
        """Size of the served tensors as they are stored."""
        return sum(self._tensors[name].stop - self._tensors[name].start for name in set(self._served()))

    def target_modules(self) -> tuple[str, ...]:
        """Kinds of modules that are changed."""
        names = [*self.modules, *self.biases, *(name for name, end in self.ends.items() if end.changes)]
        kinds = {name.rpartition(".")[2] for name in names} | {f"experts.{entry.place}" for entry in self.experts}
        return tuple(sorted(kinds))

    def rank_rows(self) -> tuple[RankRows, ...]:
        """The ranks of each kind of linear, with the number of layers that have them."""
        counts = Counter((_kind(name), entry.rank) for name, entry in self.modules.items())
        return tuple((kind, rank, num_layers) for (kind, rank), num_layers in sorted(counts.items()))

    def dense_elements(self) -> int:
        """Elements of whatever is no row of a linear's product."""
        products = self._products().values()
        vectors = sum(entry.out_features for entry in products if entry.magnitude_name or entry.b_bias_name)
        biases = sum(prod(self._tensors[name].shape) for name in self.biases.values())
        matrices = [name for end in self.ends.values() for name in (end.weight_name, end.rows_name) if name]
        products_of_ends = (end.product for end in self.ends.values() if end.product is not None)
        rows = sum(entry.rank * (entry.in_features + entry.out_features) for entry in products_of_ends)
        experts = sum(entry.num_elements for entry in self.experts)
        return vectors + biases + rows + experts + sum(prod(self._tensors[name].shape) for name in matrices)

    def warnings(self, base_model_name: str | None) -> list[str]:
        """What a reader should know of an adapter that is served."""
        warnings = list(self._lora.warnings)
        trained_on = self._lora.base_model_name
        if trained_on is None:
            warnings.append(f"{CONFIG_FILE} names no base model; checked by names and shapes only")
        elif base_model_name and _last_part(trained_on) != _last_part(base_model_name):
            warnings.append(f"trained on {shown(trained_on)}, served on {shown(base_model_name)}; the shapes fit")
        copies = [end.base_copy_name for end in self.ends.values() if end.base_copy_name]
        if copies:
            warnings.append(f"{len(copies)} copies of base weights are not used: {shown_names(copies, 3)}")
        targets = self._lora.target_modules
        if targets is not None:
            names = tuple(f".{name}" for name in targets)
            extra = [path for path in self._paths if not f".{path}".endswith(names)]
            if extra:
                warnings.append(f"tensors for modules that target_modules does not list: {shown_names(extra, 3)}")
        return warnings

    def _products(self) -> dict[str, ModuleEntry]:
        ends = {name: end.product for name, end in self.ends.items() if end.product is not None}
        return self.modules | ends

    def _served(self) -> Iterator[str]:
        for entry in self._products().values():
            yield from (entry.a_name, entry.b_name)
            yield from (name for name in (entry.magnitude_name, entry.b_bias_name) if name)
        for pair in self.experts:
            yield from (pair.a_name, pair.b_name)
        yield from self.biases.values()
        for end in self.ends.values():
            yield from (name for name in (end.weight_name, end.rows_name) if name)

    def _check_names(self, found: SortedNames) -> None:
        if not found.modules:
            kinds = [kind for kind in self._shapes if kind not in ENDS]
            expected = [f"base_model.model.model.layers.0.{kind}.lora_A.weight" for kind in kinds]
            seen = f"its tensors are {shown_names(found.unmatched, 3)}" if found.unmatched else "it has no tensors"
            raise ManifestError(
                f"no tensor fits the base model: {seen};"
                f" expected names like {shown_names(expected[:3], 3)}{self._trained_on}",
                "adapter_incompatible",
            )
        if found.unmatched:
            raise ManifestError(
                f"{len(found.unmatched)} tensors are for modules that the base model does not have:"
                f" {shown_names(found.unmatched, 10)}{self._trained_on}",
                "adapter_incompatible",
            )

    def _take_linear(self, name: str, module: ModuleNames) -> None:
        layer = int(name.split(".")[1])
        if layer >= self._config.num_layers:
            raise ManifestError(
                f"tensor {shown(next(iter(module.names.values())))} is for layer {layer}, the base model has layers 0"
                f" to {self._config.num_layers - 1}{self._trained_on}",
                "adapter_incompatible",
            )
        experts, kind = self._config.experts, _kind(name)
        if experts is not None and kind.startswith("mlp.") and (kind == ROUTER) == (layer in experts.dense_layers):
            trained, has = ("a router", "a plain MLP") if kind == ROUTER else ("a plain MLP", "experts")
            raise ManifestError(
                f"tensor {shown(next(iter(module.names.values())))} is for {trained}, layer {layer} of the base model"
                f" has {has}{self._trained_on}",
                "adapter_incompatible",
            )
        if "A" in module.names:
            self.modules[name] = self._product(name, module)
        if bias := module.names.get("bias"):
            self._check_vector(bias, self._shapes[_kind(name)][1])
            self.biases[name] = bias

    def _take_end(self, name: str, module: ModuleNames) -> None:
        names, vocabulary, hidden = module.names, self._config.vocab_size, self._config.hidden_size
        product = self._product(name, module) if "A" in names else None
        chosen = [role for role in ("A", "full copy", "rows") if role in names]
        if len(chosen) > 1:
            raise ManifestError(
                f"{shown(names['full copy' if 'full copy' in names else 'rows'])} and another change of {name} exclude"
                " each other: save the adapter again"
            )
        # Beside LoRA on the head PEFT writes the base's own bias.
        bias = names.get("bias")
        if bias is not None and (self._lora.features.bias != "none" or ".base_layer." not in bias):
            raise ManifestError(
                f"tensor {shown(bias)}: trained biases are served of the layers' linears only: train with bias 'none'",
                "adapter_unsupported",
            )
        ids: tuple[int, ...] = ()
        if rows := names.get("rows"):
            ids = self._lora.features.token_ids.get(name, ())
            self._check_matrix(rows, (len(ids), hidden), f"trainable_token_indices of {name} are {len(ids)}")
            if max(ids, default=0) >= vocabulary:
                raise ManifestError(
                    f"{CONFIG_FILE}: trainable_token_indices name token {max(ids)}, the base model's vocabulary has"
                    f" {vocabulary}{self._trained_on}",
                    "adapter_incompatible",
                )
        for role in ("full copy", "base copy"):
            if matrix := names.get(role):
                self._check_matrix(matrix, (vocabulary, hidden), f"the base model's {name} is another size")
        self.ends[name] = EndEntry(product, names.get("full copy"), rows, ids, names.get("base copy"))

    def _product(self, name: str, module: ModuleNames) -> ModuleEntry:
        a_name, b_name = module.names["A"], module.names["B"]
        blocks = self._lora.features.block_diagonal
        a_blocks, b_blocks = (1, 1) if blocks is None else blocks.blocks(module.peft_path)
        a, b = self._tensors[a_name], self._tensors[b_name]
        for tensor_name, tensor in ((a_name, a), (b_name, b)):
            if len(tensor.shape) != 2:
                raise ManifestError(
                    f"tensor {shown(tensor_name)} has the shape {list(tensor.shape)}, not two dimensions"
                )
            self._check_dtype(tensor_name)
        in_features, out_features = self._shapes[_kind(name)]
        if a.shape[1] * a_blocks != in_features or b.shape[0] != out_features:
            raise ManifestError(
                f"{name}: expected A [rank, {in_features // a_blocks}] and B [{out_features}, rank],"
                f" found {list(a.shape)} and {list(b.shape)}: trained on a base of another size{self._trained_on}",
                "adapter_incompatible",
            )
        rank = a.shape[0]
        if b.shape[1] * b_blocks != rank or rank % a_blocks or out_features % b_blocks:
            raise ManifestError(
                f"{name}: A has rank {rank} and B {b.shape[1] * b_blocks} ({shown(b_name)}): save the adapter again"
            )
        pattern_path = self._lora.pattern_path(module.peft_path)
        expected_rank = self._lora.module_rank(pattern_path)
        if rank != expected_rank:
            raise ManifestError(
                f"{name}: {shown(a_name)} has rank {rank}, {CONFIG_FILE} says {expected_rank}"
                " (r and rank_pattern): config and weights are not of the same adapter"
            )
        # DoRA's lengths are of rows of weights: of an embedding's, that is of its columns as it is stored.
        if magnitude := module.names.get("magnitude"):
            self._check_vector(magnitude, out_features)
        if b_bias := module.names.get("B bias"):
            self._check_vector(b_bias, out_features)
        if pattern_path == module.peft_path:
            self._paths.append(module.peft_path)
        scaling = self._lora.module_scaling(pattern_path, rank)
        return ModuleEntry(
            a_name, b_name, rank, scaling, in_features, out_features, a.dtype, magnitude, b_bias, a_blocks, b_blocks
        )

    def _share_with_head(self) -> None:
        """A head that is the embedding has its trained rows too, and its copy where the config names both."""
        embedding = self.ends.get("embed_tokens")
        if embedding is None or ("lm_head" in self.ends and self.ends["lm_head"].changes):
            return
        is_copied = embedding.weight_name is not None and "lm_head" in self._lora.features.modules_to_save
        if embedding.rows_name or is_copied:
            weight_name = embedding.weight_name if is_copied else None
            self.ends["lm_head"] = EndEntry(None, weight_name, embedding.rows_name, embedding.row_ids, None)

    def _check_promises(self) -> None:
        """What the config says to be in the file must be there, and nothing of a kind that it does not name."""
        features, products = self._lora.features, self._products()
        for field, says, found in (
            ("use_dora", features.use_dora, [entry.magnitude_name for entry in products.values()]),
            ("lora_bias", features.lora_bias, [entry.b_bias_name for entry in products.values()]),
        ):
            if says and not all(found):
                module = next(name for name, tensor in zip(products, found, strict=True) if not tensor)
                raise ManifestError(f"{CONFIG_FILE}: {field} is true, and {module} has no tensor for it: save it again")
            if not says and any(found):
                tensor_name = next(tensor for tensor in found if tensor)
                raise ManifestError(
                    f"tensor {shown(tensor_name)}: {CONFIG_FILE} does not say {field} true: save it again"
                )
        if self.biases and features.bias == "none":
            tensor_name = next(iter(self.biases.values()))
            raise ManifestError(f"tensor {shown(tensor_name)}: {CONFIG_FILE} says bias 'none': save it again")
        for end in features.modules_to_save:
            if end not in self.ends or not self.ends[end].weight_name:
                raise ManifestError(f"{CONFIG_FILE}: modules_to_save names {end}, and the file has no copy of it")
        for end in features.token_ids:
            if end not in self.ends or not self.ends[end].rows_name:
                raise ManifestError(
                    f"{CONFIG_FILE}: trainable_token_indices name {end}, and the file has no rows of it"
                )

    def _check_dtype(self, name: str) -> None:
        dtype = self._tensors[name].dtype
        if dtype not in SERVED_DTYPES:
            raise ManifestError(
                f"tensor {shown(name)} has dtype {dtype}: served are {', '.join(SERVED_DTYPES)};"
                " save the adapter in one of them",
                "adapter_unsupported",
            )

    def _check_vector(self, name: str, size: int) -> None:
        self._check_matrix(name, (size,), "trained on a base of another size")

    def _check_matrix(self, name: str, shape: tuple[int, ...], reason: str) -> None:
        self._check_dtype(name)
        found = self._tensors[name].shape
        if found != shape:
            raise ManifestError(
                f"tensor {shown(name)}: expected {list(shape)}, found {list(found)}: {reason}{self._trained_on}",
                "adapter_incompatible",
            )


def _kind(module: str) -> str:
    """`self_attn.q_proj` of `layers.0.self_attn.q_proj`."""
    return module if module in ENDS else module.split(".", 2)[2]


def _last_part(model_name: str) -> str:
    return model_name.rstrip("/").rpartition("/")[2].lower()
