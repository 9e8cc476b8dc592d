"""`loraplex status`."""

import argparse

from loraplex.calls import DEFAULT_TIMEOUT_SECONDS, calling
from loraplex.commands.terminal import DIGEST_CHARACTERS, gateway_client, gateway_option, table, tls_of
from loraplex.results import Model
from loraplex.tls import Tls
from loraplex.v1 import scheduler_pb2, scheduler_pb2_grpc

_EPILOG = """\
examples:
  loraplex status                                is the gateway serving, and what?
  loraplex status --scheduler 127.0.0.1:50052    and how is each worker doing?
exit code: 0 when the gateway serves, 1 when it does not
"""
# grpc.health.v1.HealthCheckResponse with status SERVING, as bytes: the client has no stubs of that package.
_SERVING = b"\x08\x01"
_STATE_NAMES = {scheduler_pb2.WORKER_STATE_READY: "ready", scheduler_pb2.WORKER_STATE_DRAINING: "draining"}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "status",
        parents=[gateway_option()],
        help="say whether the gateway serves, and what",
        description="Says whether the gateway serves, lists its models and, given the scheduler, the workers.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scheduler", metavar="HOST:PORT", help="also ask this scheduler for the state of the fleet")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    tls = tls_of(arguments)
    serving = is_serving(arguments.gateway, tls)
    print(f"gateway {arguments.gateway}: {'serving' if serving else 'not serving'}")
    if serving:
        with gateway_client(arguments) as client:
            models = client.models()
        print(table(["MODEL", "VERSION", "BASE MODEL", "CONTEXT TOKENS"], [_model_row(model) for model in models]))
    if arguments.scheduler:
        print_fleet(arguments.scheduler, tls)
    return 0 if serving else 1


def is_serving(address: str, tls: Tls) -> bool:
    """What the standard health service says. Raises LoraplexError when nobody answers at `address`."""
    with tls.channel(address) as channel, calling(address) as metadata:
        check = channel.unary_unary("/grpc.health.v1.Health/Check", bytes, bytes)
        return bool(check(b"", timeout=DEFAULT_TIMEOUT_SECONDS, metadata=metadata) == _SERVING)


def print_fleet(address: str, tls: Tls) -> None:
    """The scheduler's view. Raises LoraplexError."""
    with tls.channel(address) as channel, calling(address) as metadata:
        scheduler = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        state = scheduler.GetState(scheduler_pb2.GetStateRequest(), timeout=DEFAULT_TIMEOUT_SECONDS, metadata=metadata)
    print(
        f"scheduler {address}: epoch {state.scheduler_epoch}, {state.gateways} gateways, "
        f"{state.queued_requests} requests with {state.queued_tokens} tokens queued"
    )
    header = ["WORKER", "ADDRESS", "STATE", "RUNNING", "OFFERED", "FREE PAGES", "PAGES", "ADAPTERS IN PAGES"]
    print(table(header, [_worker_row(worker) for worker in state.workers]))
    if state.tenants:
        header = ["WAITING TENANT", "WEIGHT", "QUEUED", "SECONDS OF WORK", "BEHIND ITS SHARE"]
        print(table(header, [_tenant_row(tenant) for tenant in state.tenants]))


def _model_row(model: Model) -> list[object]:
    version = model.adapter_version[:DIGEST_CHARACTERS]
    return [model.adapter_id or "(base)", version, model.base_model, model.max_context_tokens]


def _worker_row(worker: scheduler_pb2.WorkerSnapshot) -> list[object]:
    info, memory = worker.info, worker.memory
    state = _STATE_NAMES.get(info.state, "unknown")
    counts = [worker.running_requests, worker.offered_requests, memory.free_pages, memory.total_pages]
    return [info.worker_id, info.address, state, *counts, len(worker.resident)]


def _tenant_row(tenant: scheduler_pb2.TenantSnapshot) -> list[object]:
    behind = f"{tenant.deficit:.1f}" if tenant.HasField("deficit") else "not counted"
    return [tenant.tenant, f"{tenant.weight:g}", tenant.queued_requests, f"{tenant.queued_seconds:.1f}", behind]
