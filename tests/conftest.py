"""What all tests share: one thread a process, so that tests beside each other do not wait for each other's spinning."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
