"""What all tests share: one thread a process, so that tests beside each other do not wait for each other's spinning.

Where there is no GPU, Triton runs its kernels in its interpreter; it must be told before it is first imported, which
transformers does. Where there is one, the same tests run the kernels compiled.
"""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
