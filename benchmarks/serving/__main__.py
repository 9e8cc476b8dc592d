"""Serves workload W with several systems in turn and prints one JSON line for each; refuses what is wrong.

A run:
  1. The tests of the parts must be green (once for each state of the tree).
  2. Models, adapters and a store full of them are written to build/bench, when they are not there.
  3. Each system starts in a process of its own, all with the same threads, and answers the workload once to warm up.
     Its tokens must be PEFT's.
  4. The systems take turns. Each run's tokens are compared again; the first wrong one ends it, and nothing is reported.
  5. Rows go to standard output and to benchmarks/results/serving.jsonl. Medians; quartiles beside them.

Systems, workloads and models are comma-separated names. The workload n8 is 64 requests over 8 adapters, nearly all
of them for the first few; `distinct` is 64 requests on 64 adapters, `one` the same requests on one.

Examples:
  python -m benchmarks.serving --models S --systems engine,peft --runs 3
  python -m benchmarks.serving --models M --workloads distinct --systems engine,lora-off
  python -m benchmarks.serving --report        # writes the tables of docs/performance.md from the rows
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

from benchmarks.hardware import ROOT, commit, hardware
from benchmarks.kernels.models import SIZES
from benchmarks.serving import campaign
from benchmarks.serving.catalogue import ENTRIES, ORACLE, chosen
from benchmarks.serving.fixture import FOLDER, Fixture, prepare
from benchmarks.serving.green import tests_are_green
from benchmarks.serving.host import Host, HostError
from benchmarks.serving.outcome import Outcome, Tokens
from benchmarks.serving.progress import say
from benchmarks.serving.reference import reference
from benchmarks.serving.rows import Row, row
from benchmarks.serving.workload import Workload, named

RESULTS = ROOT / "benchmarks" / "results" / "serving.jsonl"
RUNS = {"S": 5, "M": 3}


class Bench:
    """One model: its files, the systems that run, and what PEFT answers."""

    def __init__(self, fixture: Fixture, threads: int, stack: ExitStack) -> None:
        self._fixture = fixture
        self._threads = threads
        self._stack = stack
        self._hosts: dict[str, Host] = {}
        self._known: dict[str, Tokens] = {}

    def measure(self, workload: Workload, systems: list[str], runs: int) -> Iterator[Row]:
        """Rows of one workload. Raises WrongTokensError before any of them when one answer is wrong."""
        warm = campaign.Results()
        for system in systems:
            asked = self._asked(system, workload)
            if ENTRIES[system].slow:
                self._run(system, asked.first(4, 4))
            else:
                outcome = self._run(system, asked)
                campaign.check(system, outcome, self._expected(asked), warm, ENTRIES[system].may_differ)
        say(f"{self._fixture.model} {workload.name}: {runs} runs of {', '.join(systems)}")
        results = campaign.run_in_turns(
            systems,
            runs,
            lambda system: self._run(system, self._asked(system, workload)),
            lambda system: self._expected(self._asked(system, workload)),
            lambda system: ENTRIES[system].may_differ,
        )
        for system in systems:
            outcomes, wrong = results.outcomes[system], results.wrong[system]
            asked = self._asked(system, workload)
            yield row(self._fixture.model, workload, system, ENTRIES[system], outcomes, wrong) | {
                "output_tokens": asked.output_tokens
            }

    def _asked(self, system: str, workload: Workload) -> Workload:
        return workload.of_base() if ENTRIES[system].of_base else workload

    def _run(self, system: str, workload: Workload) -> Outcome:
        outcome = self._host(ENTRIES[system].host).run(workload, ENTRIES[system].how)
        say(f"{self._fixture.model} {workload.name} {system}: {outcome.tokens_per_second:.1f} tokens/s")
        return outcome

    def _host(self, name: str) -> Host:
        if name not in self._hosts:
            say(f"{self._fixture.model}: starting {name}")
            arguments = {"folder": str(self._fixture.folder), "model": self._fixture.model}
            self._hosts[name] = self._stack.enter_context(Host(name, arguments, self._threads))
        return self._hosts[name]

    def _expected(self, workload: Workload) -> Tokens:
        if workload.name not in self._known:
            ask = lambda: self._run(ORACLE, workload).outputs  # noqa: E731
            self._known[workload.name] = reference(self._fixture, workload, ask)
        return self._known[workload.name]


def main() -> None:
    options = _options()
    if not tests_are_green():
        sys.exit("the tests of the parts are red: no number is worth reporting")
    about = {"hardware": hardware(), "commit": commit(), "run": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    about |= {"threads": options.threads, "command": "python -m benchmarks.serving " + " ".join(sys.argv[1:])}
    rows: list[Row] = []
    try:
        for model in options.models.split(","):
            workloads = [named(name, SIZES[model].vocab) for name in options.workloads.split(",")]
            fixture = prepare(model, max(workload.adapters for workload in workloads), FOLDER)
            with ExitStack() as stack:
                bench = Bench(fixture, options.threads, stack)
                for workload in workloads:
                    rows += bench.measure(workload, chosen(options.systems), options.runs or RUNS[model])
    except (campaign.WrongTokensError, HostError) as problem:
        sys.exit(f"nothing is reported: {problem}")
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        for found in rows:
            line = json.dumps(found | about)
            print(line, flush=True)
            file.write(line + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="S,M", help="S, M or both")
    parser.add_argument("--workloads", default="n8,n64,distinct,one", help="default: %(default)s")
    parser.add_argument("--systems", default="engine,lora-off,unary,stream,peft", help=f"of {', '.join(ENTRIES)}")
    parser.add_argument("--runs", type=int, default=0, help="of each system; default: 5 for S, 3 for M")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every system alike")
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
