"""The compiled CPU kernels: one shared library with a plain C interface, sources beside each operation."""
