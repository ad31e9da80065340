"""`python -m loraplex_models.adapters.unpickle FOLDER NEW_FOLDER`: the conversion of a pickle in a process of its own.

Torch's restricted reader runs no code of the pickle; a crash of it, or the memory that a pickle makes it take, is this
process's and nobody else's.
"""

import resource
import sys

from loraplex_models.adapters.convert import convert_adapter
from loraplex_models.adapters.refusal import ManifestError

# Of addresses: more than any adapter's weights, twice, and what torch maps.
MAX_MEMORY_BYTES = 32 * 2**30


def main(source: str, target: str) -> int:
    """Convert; on a refusal print the reason and return 1."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    try:
        convert_adapter(source, target)
    except ManifestError as error:
        # What clients read names files and no folders.
        print(str(error).replace(f"{source}/", ""))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
