"""A process for one system, so that its memory is its own and it sleeps while the others run.

The parent writes one JSON line a run: which workload, and how. The child answers with an Outcome, or with the
sentence of what went wrong.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from benchmarks.hardware import ROOT
from benchmarks.serving.catalogue import BASELINES, PEERS
from benchmarks.serving.outcome import Outcome
from benchmarks.serving.workload import Request, Workload


class System(Protocol):
    """What a module of `systems` has."""

    def run(self, workload: Workload, how: str) -> Outcome:
        """Answers all requests and says when each token was there."""

    def close(self) -> None:
        """Ends what the system started."""


class HostError(Exception):
    """A system could not start or could not run; the sentence is its own."""


def thread_settings(threads: int) -> dict[str, str]:
    """The same for every system."""
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}


class Host:
    """A running child. Raises HostError when the system does not start."""

    def __init__(self, host: str, arguments: Mapping[str, object], threads: int) -> None:
        self.name = host
        python = str(ROOT / "build" / "peers" / PEERS[host] / "bin" / "python") if host in PEERS else sys.executable
        if not Path(python).exists():
            raise HostError(f"{host} is not installed: run `make bench-peers`")
        command = [python, "-m", "benchmarks.serving.host", host, json.dumps(dict(arguments, threads=threads))]
        environment = {**os.environ, **thread_settings(threads)}
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def run(self, workload: Workload, how: str) -> Outcome:
        assert self._process.stdin is not None
        requests = [[request.adapter, request.prompt, request.output_tokens] for request in workload.requests]
        order = {"how": how, "name": workload.name, "adapters": workload.adapters, "requests": requests}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Outcome.from_json(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise HostError(f"{self.name} ended with code {self._process.wait()}; its last words are above")
        if line.startswith("!"):
            raise HostError(f"{self.name}: {line[1:].strip()}")
        return line

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _workload(order: dict[str, Any]) -> Workload:
    requests = tuple(Request(adapter, tuple(prompt), length) for adapter, prompt, length in order["requests"])
    return Workload(order["name"], order["adapters"], requests)


def main() -> None:
    # Whatever a library prints must not look like an answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    host, arguments = sys.argv[1], json.loads(sys.argv[2])
    try:
        system = _start(host, arguments)
    except Exception as problem:
        traceback.print_exc()
        answers.write(f"!{type(problem).__name__}: {' '.join(str(problem).split())}\n")
        return
    try:
        answers.write("ready\n")
        for line in sys.stdin:
            order = json.loads(line)
            answers.write(system.run(_workload(order), order["how"]).to_json() + "\n")
    except Exception as problem:
        traceback.print_exc()
        answers.write(f"!{type(problem).__name__}: {' '.join(str(problem).split())}\n")
    finally:
        system.close()


def _start(host: str, arguments: dict[str, Any]) -> Any:
    """Imports the one module that is needed."""
    if host in PEERS:
        return _start_peer(host, Path(arguments["folder"]), arguments["threads"])
    from benchmarks.serving.fixture import Fixture

    fixture, threads = Fixture.of(arguments["model"]), arguments["threads"]
    memory, adapter_bytes = arguments["memory"], arguments["adapter_bytes"]
    if host == "engine":
        from benchmarks.serving.systems.engine import EngineSystem

        return EngineSystem(fixture, threads, memory)
    if host.startswith("fleet"):
        from benchmarks.serving.systems.fleet import FleetSystem

        return FleetSystem(fixture, threads, fixture.fleet_data(host))
    if host in BASELINES:
        from benchmarks.baselines import systems

        return systems.start(host, fixture, threads, memory, adapter_bytes)
    from benchmarks.serving.systems.peft import PeftSystem

    return PeftSystem(fixture, threads)


def _start_peer(host: str, folder: Path, threads: int) -> Any:
    if host == "llama-cpp":
        from benchmarks.peers.llama_cpp import LlamaCppSystem

        return LlamaCppSystem(folder, threads)
    from benchmarks.peers.vllm import VllmSystem

    # as many adapters as W over 64 asks for, and a few more
    return VllmSystem(folder, threads, 32 if host == "vllm" else 0)


if __name__ == "__main__":
    main()
