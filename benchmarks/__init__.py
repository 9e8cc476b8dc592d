"""Benchmarks: nothing here is imported by what is served."""
