"""Asks a release what a user would: is it healthy, does it take an adapter, does it answer? `helm test` runs it.

`python -m deploy.check --gateway HOST:PORT [--adapter FOLDER] [--prompt TEXT] [--expected TEXT]`
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraplex import Client, LoraplexError

ADAPTER_ID = "helm-test"
_SECONDS = 60.0


def check(gateway: str, prompt: str, adapter: Path | None, expected: str) -> str:
    """What was seen. Raises AssertionError, LoraplexError or grpc.RpcError where it is not as it should be."""
    with grpc.insecure_channel(gateway) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="readiness")
        status = stub.Check(request, timeout=_SECONDS, wait_for_ready=True).status
    assert status == health_pb2.HealthCheckResponse.SERVING, "the gateway is not ready"
    with Client(gateway) as client:
        name = ""
        if adapter is not None:
            name = ADAPTER_ID
            client.adapters.push(name, adapter, replace=True)
        try:
            answer = client.generate(prompt, name, temperature=0.0, max_tokens=32, timeout=_SECONDS).text
        finally:
            if name:
                client.adapters.delete(name)
    assert not expected or answer == expected, f"the answer is {answer!r}, not {expected!r}"
    return f"healthy; {name or 'the base model'} answers {prompt!r} with {answer!r}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.check", description=__doc__)
    parser.add_argument("--gateway", required=True, help="HOST:PORT")
    parser.add_argument("--adapter", type=Path, help="folder of a PEFT adapter that is uploaded, asked and deleted")
    parser.add_argument("--prompt", default="Hello")
    parser.add_argument("--expected", default="", help="the whole answer; empty: any")
    options = parser.parse_args(argv)
    try:
        print(check(options.gateway, options.prompt, options.adapter, options.expected))
    except (AssertionError, LoraplexError, grpc.RpcError) as problem:
        print(f"failed: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
