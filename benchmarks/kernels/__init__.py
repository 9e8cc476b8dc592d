"""Every kernel on every backend against its floor: `make bench-kernels`."""
