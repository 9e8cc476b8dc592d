"""Plumbing every service shares; it has no idea what a token is."""

import os

# Before grpc is imported. A process we start only forks to execute something else at once; gRPC's fork handlers would
# stop and restart the threads of the streams that go on meanwhile, and now and then one stays stopped.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
