"""Benchmarks of the memory manager: `python -m benchmarks.memory`."""
