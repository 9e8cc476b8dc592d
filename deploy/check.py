"""Asks a release what a user would: is it healthy, does it take an adapter, does it answer? `helm test` runs it.

`python -m deploy.check --gateway HOST:PORT [--adapter FOLDER] [--prompt TEXT] [--expected TEXT] [--ca FILE]`
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraplex import Client, LoraplexError
from loraplex.errors import from_rpc_error
from loraplex.tls import Tls, TlsError

ADAPTER_ID = "helm-test"
_SECONDS = 60.0


def check(gateway: str, prompt: str, adapter: Path | None, expected: str, ca: str | None = None) -> str:
    """What was seen. Raises AssertionError, LoraplexError or grpc.RpcError where it is not as it should be."""
    assert _health(gateway, ca) == health_pb2.HealthCheckResponse.SERVING, "the gateway is not ready"
    with Client(gateway, ca=ca) as client:
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


def _health(gateway: str, ca: str | None) -> int:
    """Asked again for a minute while nobody answers; a refused certificate gets no better. Raises LoraplexError."""
    deadline = time.monotonic() + _SECONDS
    with Tls(ca=ca).channel(gateway) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="readiness")
        while True:
            try:
                return int(stub.Check(request, timeout=_SECONDS).status)
            except grpc.RpcError as error:
                problem = from_rpc_error(error, address=gateway)
                if problem.reason != "UNREACHABLE" or time.monotonic() > deadline:
                    raise problem from None
            time.sleep(0.2)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.check", description=__doc__)
    parser.add_argument("--gateway", required=True, help="HOST:PORT")
    parser.add_argument("--adapter", type=Path, help="folder of a PEFT adapter that is uploaded, asked and deleted")
    parser.add_argument("--prompt", default="Hello")
    parser.add_argument("--expected", default="", help="the whole answer; empty: any")
    parser.add_argument("--ca", help="authority of the gateway's certificate, or `system`; without it there is no TLS")
    options = parser.parse_args(argv)
    try:
        print(check(options.gateway, options.prompt, options.adapter, options.expected, options.ca))
    except (AssertionError, LoraplexError, TlsError, grpc.RpcError) as problem:
        print(f"failed: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
