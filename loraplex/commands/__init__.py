"""The sub-commands of `loraplex`, one file per group."""
