"""The operations in Triton: for GPUs, and for Triton's interpreter, which runs them slowly on a CPU to prove them."""
