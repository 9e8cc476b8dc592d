"""What the Triton kernels share: launches, tile choices, lookups in page tables, ahead-of-time compilation.

Nothing outside this folder and the `triton.py` of each operation imports triton, and those are imported when a kernel
is first wanted.
"""
