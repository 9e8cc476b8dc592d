"""The GPU path: kernels compiled ahead of time, and what a machine with a GPU runs."""
