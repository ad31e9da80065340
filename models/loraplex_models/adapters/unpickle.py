"""`python -m loraplex_models.adapters.unpickle SOURCE TARGET`: a pickled state dict as safetensors, with nothing run.

The pickle is read by torch's restricted reader, which knows tensors and plain containers and refuses all else. It runs
in a process of its own: a crash, or memory that it takes, is that process's.
"""

import pickle
import resource
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

# More than any adapter's weights, twice.
MAX_MEMORY_BYTES = 32 * 2**30


def convert(source: Path, target: Path) -> None:
    """Write the tensors of the pickle `source` to the safetensors file `target`. Raises ValueError with the reason."""
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"{source.name} is not a plain state dict: {reason[:300]}") from None
    is_state_dict = isinstance(state, dict) and state and all(isinstance(key, str) for key in state)
    if not is_state_dict or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{source.name} does not hold tensors by name: it is not the state dict of an adapter")
    # Clones: a file of safetensors holds no shared memory.
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, target)


def main(source: str, target: str) -> int:
    """Convert; on a refusal print the reason and return 1."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    try:
        convert(Path(source), Path(target))
    except ValueError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
