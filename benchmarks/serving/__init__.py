"""Whole systems on one workload, each beside its peers in the same run: `make bench`."""
