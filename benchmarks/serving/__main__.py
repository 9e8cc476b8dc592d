"""Serves workload W with several systems in turn and prints one JSON line for each; refuses what is wrong.

A run:
  1. The tests of the parts must be green (once for each state of the tree).
  2. Models, adapters and a store full of them are written to build/bench, when they are not there.
  3. Each system starts in a process of its own, all with the same threads, and answers the workload once to warm up.
  4. Rounds follow: the systems take turns with the same requests, whose prompts are new in each round. All tokens are
     compared with PEFT's; a wrong one ends the run, and nothing is reported of its workload.
  5. After each workload its rows go to standard output and to benchmarks/results/serving.jsonl: medians, quartiles.

Systems, workloads and models are comma-separated names. The workload n8 is 64 requests over 8 adapters, nearly all
of them for the first few; `distinct` is 64 requests on 64 adapters, `distinct-bf16` the same with the adapters' files
in bfloat16, `one` the same requests on one.

Examples:
  python -m benchmarks.serving --models S --systems engine,peft --rounds 3
  python -m benchmarks.serving --models M --workloads distinct --systems engine,lora-off
  python -m benchmarks.serving --models S --workloads n64 --systems engine,padded-bmm,divided --pools 1.0,0.5,0.25
`make bench-report` writes the tables and plots of docs/performance.md from the rows.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from benchmarks.hardware import ROOT, commit, hardware
from benchmarks.kernels.machine import measure_floors
from benchmarks.kernels.models import SIZES
from benchmarks.serving.bench import Bench
from benchmarks.serving.campaign import WrongTokensError
from benchmarks.serving.catalogue import ENTRIES, chosen
from benchmarks.serving.fixture import Fixture, pool_bytes, prepare
from benchmarks.serving.green import tests_are_green
from benchmarks.serving.host import HostError
from benchmarks.serving.likeness import likeness
from benchmarks.serving.progress import say
from benchmarks.serving.rows import Row
from benchmarks.serving.workload import BASE, named

RESULTS = ROOT / "benchmarks" / "results" / "serving.jsonl"
# Beside a share of the KV, a capped pool has room for the first of the adapters.
CAPPED_ADAPTERS = 16
ROUNDS = {"S": 5, "M": 3}


def main() -> None:
    options = _options()
    if not tests_are_green():
        sys.exit("the tests of the parts are red: no number is worth reporting")
    about: dict[str, Any] = {"run": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "commit": commit()}
    about |= {"threads": options.threads, "command": "python -m benchmarks.serving " + " ".join(sys.argv[1:])}
    machine, peak = hardware(), measure_floors().flops_per_second
    RESULTS.parent.mkdir(exist_ok=True)
    try:
        for model in options.models.split(","):
            for rows in measure(model, options):
                like = likeness(rows, str(machine["cpu"]), options.threads)
                say(like)
                for found in rows:
                    line = json.dumps(found | _share(found, peak) | about | {"hardware": machine | {"like": like}})
                    print(line, flush=True)
                    with RESULTS.open("a") as file:
                        file.write(line + "\n")
    except (WrongTokensError, HostError) as problem:
        sys.exit(f"nothing is reported of this workload: {problem}")


def _share(found: Row, peak: float) -> dict[str, float]:
    """How much of the machine's multiply-add rate the row is."""
    seconds = found["output_tokens"] / found["tokens_per_second"]
    return {"peak_gigaflops": round(peak / 1e9, 1), "peak_share": round(found["flops"] / seconds / peak, 4)}


def measure(model: str, options: argparse.Namespace) -> Iterator[list[Row]]:
    """Rows of one model, workload by workload. Each pool has processes of its own."""
    systems, rounds = chosen(options.systems), options.rounds or ROUNDS[model]
    workloads = [named(name, SIZES[model].vocab) for name in options.workloads.split(",")]
    fixture = Fixture.of(model)
    numbered = range(max(CAPPED_ADAPTERS, *(workload.adapters for workload in workloads)))
    asked = {request.adapter for workload in workloads for request in workload.requests} - {BASE}
    prepare(fixture, sorted(asked.union(numbered)))
    if not options.pools:
        with ExitStack() as stack:
            bench = Bench(fixture, options.threads, stack)
            for workload in workloads:
                if options.learn:
                    bench.learn(workload, systems, rounds)
                else:
                    yield bench.measure(workload, systems, rounds)
        return
    for workload in workloads:
        for share in map(float, options.pools.split(",")):
            pool = pool_bytes(fixture, workload, share, CAPPED_ADAPTERS)
            say(f"{model} {workload.name}: pools of {pool[0]:,} bytes for {share:g} of the KV and 16 adapters")
            with ExitStack() as stack:
                found = Bench(fixture, options.threads, stack, pool).measure(workload, systems, rounds)
                yield [row | {"pool_kv_share": share, "pool_bytes": pool[0]} for row in found]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="S,M", help="S, M or both")
    parser.add_argument("--workloads", default="n8,n64,distinct,one", help="default: %(default)s")
    parser.add_argument("--systems", default="engine,lora-off,unary,stream,peft", help=f"of {', '.join(ENTRIES)}")
    parser.add_argument("--rounds", type=int, default=0, help="runs of each system; default: 5 for S, 3 for M")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every system alike")
    parser.add_argument("--learn", action="store_true", help="only ask PEFT for the tokens, which are then kept")
    parser.add_argument(
        "--pools",
        default="",
        help="cap every engine's pool: shares of all requests' KV, each beside 16 adapters: 1.0,0.5,0.25",
    )
    options = parser.parse_args()
    try:
        chosen(options.systems)
        for model in options.models.split(","):
            if model not in SIZES:
                raise ValueError(f"{model!r} is no model; known: {', '.join(SIZES)}")
            for name in options.workloads.split(","):
                named(name, SIZES[model].vocab)
    except ValueError as problem:
        parser.error(str(problem))
    return options


if __name__ == "__main__":
    main()
