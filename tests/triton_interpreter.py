"""Tests that run whole models through Triton's interpreter, on tensors of the CPU."""

import os

import pytest

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="there is a GPU here, and Triton compiles (TRITON_INTERPRET=1)"
)
