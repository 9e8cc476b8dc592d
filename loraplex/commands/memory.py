"""`loraplex memory`: what each worker's memory holds, as a table with bars that follows it."""

import argparse
import os
import sys
import time
from collections.abc import Sequence

from loraplex.calls import DEFAULT_TIMEOUT_SECONDS, calling
from loraplex.commands.terminal import DIGEST_CHARACTERS, table, tls_of, tls_options
from loraplex.tls import Tls
from loraplex.v1 import memory_pb2, memory_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc, types_pb2

SCHEDULER_VARIABLE = "LORAPLEX_SCHEDULER"
DEFAULT_SCHEDULER = "127.0.0.1:50052"
BAR_CHARACTERS = 48
_EPILOG = """\
how to read it:
  pages    one pool for everything: K = KV of running requests, P = cached prefixes, A = adapters, L = adapters
           being loaded, Q = freed but a step in flight may touch them, . = free
  host     adapters at hand in host memory; the next load copies them into pages
  cache    files of fetched adapters on the worker's disk
  waste    bytes of adapter pages that no adapter fills: less than one page for each adapter
examples:
  loraplex memory                                      follow every worker of the scheduler at 127.0.0.1:50052
  loraplex memory --once                               print it once and end
  loraplex memory --worker 127.0.0.1:50060 --rows 50   one worker, with more of its adapters
  loraplex memory --once | grep loading                plain lines when not on a terminal
"""
_KINDS = (
    ("K", "kv_pages", "kv"),
    ("P", "prefix_pages", "prefix"),
    ("A", "adapter_pages", "adapters"),
    ("L", "loading_pages", "loading"),
    ("Q", "quarantined_pages", "quarantined"),
    (".", "free_pages", "free"),
)
_TIERS = {types_pb2.TIER_PAGES: "pages", types_pb2.TIER_HOST: "host"}
_CLEAR = "\x1b[H\x1b[J"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "memory",
        parents=[tls_options()],
        help="show what the workers' memory holds",
        description="Shows each worker's pool of pages, its host tier, its cache folder and its adapters.\n"
        "Follows them on a terminal, prints them once elsewhere.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--scheduler",
        metavar="HOST:PORT",
        default=os.environ.get(SCHEDULER_VARIABLE, DEFAULT_SCHEDULER),
        help=f"whose workers to show [%(default)s; set by {SCHEDULER_VARIABLE}]",
    )
    parser.add_argument("--worker", metavar="HOST:PORT", action="append", help="show this worker only; may be repeated")
    parser.add_argument("--rows", type=int, default=12, metavar="N", help="most adapters of a worker [%(default)s]")
    parser.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="pause between looks [%(default)s]")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--watch", action="store_true", help="look again and again until Ctrl-C")
    mode.add_argument("--once", action="store_true", help="look once")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    tls = tls_of(arguments)
    on_terminal = sys.stdout.isatty()
    watch = arguments.watch or (on_terminal and not arguments.once)
    while True:
        addresses = arguments.worker or worker_addresses(arguments.scheduler, tls)
        report = "\n\n".join(describe(*look(address, tls), address, arguments.rows) for address in addresses)
        print((_CLEAR if watch and on_terminal else "") + (report or "no workers"), flush=True)
        if not watch:
            return 0
        time.sleep(arguments.every)
        if not on_terminal:
            print()


def worker_addresses(scheduler: str, tls: Tls) -> list[str]:
    """Of the workers that the scheduler knows. Raises LoraplexError."""
    with tls.channel(scheduler) as channel, calling(scheduler) as metadata:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        state = stub.GetState(scheduler_pb2.GetStateRequest(), timeout=DEFAULT_TIMEOUT_SECONDS, metadata=metadata)
    return [worker.info.address for worker in state.workers]


def look(address: str, tls: Tls) -> tuple[memory_pb2.GetUsageResponse, Sequence[scheduler_pb2.ResidentAdapter]]:
    """What a worker holds now. Raises LoraplexError."""
    with tls.channel(address) as channel, calling(address) as metadata:
        stub = memory_pb2_grpc.MemoryServiceStub(channel)
        usage = stub.GetUsage(memory_pb2.GetUsageRequest(), timeout=DEFAULT_TIMEOUT_SECONDS, metadata=metadata)
        resident = stub.ListResident(
            memory_pb2.ListResidentRequest(), timeout=DEFAULT_TIMEOUT_SECONDS, metadata=metadata
        )
    return usage, resident.adapters


def describe(
    usage: memory_pb2.GetUsageResponse, adapters: Sequence[scheduler_pb2.ResidentAdapter], address: str, rows: int
) -> str:
    """One worker: its bars and the adapters that take most."""
    memory = usage.memory
    counts = [(letter, getattr(memory, field)) for letter, field, _ in _KINDS]
    named = ", ".join(f"{getattr(memory, field)} {name}" for _, field, name in _KINDS)
    taken = memory.adapter_pages * memory.page_bytes
    waste = 1 - memory.adapter_bytes / taken if taken else 0.0
    lines = [
        f"{usage.worker_id}  {address}  {usage.running_sequences} running, {usage.waiting_sequences} waiting",
        f"pages  {share_bar(counts)}  {memory.total_pages} of {_size(memory.page_bytes)}: {named}",
        f"host   {_fill_bar(memory.host_adapter_bytes, memory.host_limit_bytes)}  {memory.host_adapters} adapters",
        f"cache  {_fill_bar(usage.cache_bytes, usage.cache_limit_bytes)}  {usage.cached_adapters} adapters",
        f"{usage.resident_adapters} adapters in pages, {memory.pinned_adapters} pinned: "
        f"{_size(memory.adapter_bytes)}, waste {waste:.1%}; "
        f"{memory.fetching_adapters} being fetched, {memory.loading_adapters} being loaded",
    ]
    shown = sorted(adapters, key=lambda adapter: (-adapter.tier, -adapter.pins, adapter.adapter_version))[:rows]
    if shown:
        lines.append(table(["ADAPTER", "TIER", "PAGES", "SIZE", "USED BY", "STATE"], [_row(item) for item in shown]))
    if len(adapters) > len(shown):
        lines.append(f"and {len(adapters) - len(shown)} more")
    return "\n".join(lines)


def share_bar(counts: Sequence[tuple[str, int]]) -> str:
    """`[KKKKAA......]`: each kind's share in characters; whoever has anything has at least one.

    Largest remainders (Hamilton's method), so that the bar is always as long.
    """
    total = max(1, sum(count for _, count in counts))
    exact = [count * BAR_CHARACTERS / total for _, count in counts]
    lengths = [max(1, int(share)) if count else 0 for share, (_, count) in zip(exact, counts, strict=True)]
    while sum(lengths) != BAR_CHARACTERS and any(lengths):
        step = 1 if sum(lengths) < BAR_CHARACTERS else -1
        changeable = [index for index, length in enumerate(lengths) if counts[index][1] and length + step >= 1]
        lengths[max(changeable, key=lambda index: step * (exact[index] - lengths[index]))] += step
    return "[" + "".join(letter * length for (letter, _), length in zip(counts, lengths, strict=True)) + "]"


def _fill_bar(used_bytes: int, limit_bytes: int) -> str:
    bar = share_bar([("#", used_bytes), (".", max(0, limit_bytes - used_bytes))])
    return f"{bar}  {_size(used_bytes)} of {_size(limit_bytes)}"


def _row(adapter: scheduler_pb2.ResidentAdapter) -> list[object]:
    state = "loading" if adapter.loading else "pinned" if adapter.operator_pinned else ""
    used_by = adapter.pins - adapter.operator_pinned
    tier = _TIERS.get(adapter.tier, "unknown")
    return [
        adapter.adapter_version[:DIGEST_CHARACTERS],
        tier,
        adapter.num_pages,
        _size(adapter.num_bytes),
        used_by,
        state,
    ]


def _size(num_bytes: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} B"
