"""The linears of a checkpoint's layers, read from the headers of its files alone; no torch."""

import re
from pathlib import Path

from loraplex_models.adapters.refusal import ManifestError
from loraplex_models.adapters.tensor_header import read_tensor_header

LINEAR_NAME = re.compile(r"(?:[a-z_]+\.)*layers\.\d+\.(?P<kind>(?:self_attn|mlp)\.[a-z0-9_]+)\.weight")

# The kind of a linear (`self_attn.q_proj`), its input and its output size.
LinearShape = tuple[str, int, int]


def read_linears(folder: Path) -> tuple[LinearShape, ...]:
    """Return the kinds of linears of a model's layers, by name.

    A kind that has several shapes in one model is left out. Raises ManifestError for a file that is broken.
    """
    shapes: dict[str, set[tuple[int, int]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            try:
                tensors = read_tensor_header(file, path.stat().st_size).tensors
            except ManifestError as error:
                raise ManifestError(f"'{path.name}': {error}") from None
        for name, tensor in tensors.items():
            if (found := LINEAR_NAME.fullmatch(name)) and len(tensor.shape) == 2:
                out_size, in_size = tensor.shape
                shapes.setdefault(found["kind"], set()).add((in_size, out_size))
    return tuple((kind, *of_kind.pop()) for kind, of_kind in sorted(shapes.items()) if len(of_kind) == 1)
