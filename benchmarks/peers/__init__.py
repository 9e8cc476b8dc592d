"""Other people's engines on the same workload, each run by the Python of an environment of its own: `make bench-peers`.

Nothing of ours but the numbers of the workload is imported here. The adapters' files are those that PEFT saved.
"""
