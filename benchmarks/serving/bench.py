"""One model under measurement: its processes, the rounds, and what PEFT answers."""

from contextlib import ExitStack
from dataclasses import replace

from benchmarks.serving import campaign
from benchmarks.serving.catalogue import ENTRIES, ORACLE
from benchmarks.serving.fixture import Fixture
from benchmarks.serving.host import Host
from benchmarks.serving.neighbours import Neighbours
from benchmarks.serving.outcome import QUIET, Outcome, Tokens
from benchmarks.serving.progress import say
from benchmarks.serving.reference import reference
from benchmarks.serving.roofline import flops
from benchmarks.serving.rows import Row, row
from benchmarks.serving.workload import Workload, with_other_prompts


class Bench:
    """Starts each system when it is first needed; `stack` ends them."""

    def __init__(self, fixture: Fixture, threads: int, stack: ExitStack, pool: tuple[int, int] = (0, 0)) -> None:
        """`pool`: bytes of every engine's pool, and of the adapters' part where it is divided; 0 = room for all."""
        self._fixture = fixture
        self._threads = threads
        self._stack = stack
        self._pool = pool
        self._hosts: dict[str, Host] = {}

    def measure(self, workload: Workload, systems: list[str], rounds: int) -> list[Row]:
        """Rows of one workload. Raises WrongTokensError when one answer is wrong."""
        for system in systems:
            asked = self._asked(system, workload, rounds)
            self._run(system, asked.first(4, 4) if ENTRIES[system].slow else asked)
        say(f"{self._fixture.model} {workload.name}: {rounds} rounds of {', '.join(systems)}")
        results = campaign.run_in_rounds(
            systems,
            rounds,
            lambda system, number: self._run(system, self._asked(system, workload, number)),
            lambda system, number: self._expected(self._asked(system, workload, number)),
            lambda system: ENTRIES[system].may_differ,
        )
        model = self._fixture.model
        return [
            row(model, workload, system, ENTRIES[system], found.outcomes, found.wrong)
            | {"flops": flops(self._fixture.size, self._asked(system, workload, 0))}
            for system, found in results.items()
        ]

    def learn(self, workload: Workload, systems: list[str], rounds: int) -> None:
        """Asks PEFT for every token that `measure` will compare with, so that measuring takes less time."""
        for system in systems:
            for number in range(rounds):
                self._expected(self._asked(system, workload, number))

    def _asked(self, system: str, workload: Workload, number: int) -> Workload:
        """Each round has prompts of its own: a cache of prefixes would answer a question asked twice."""
        asked = with_other_prompts(workload, self._fixture.size.vocab, number)
        return asked.of_base() if ENTRIES[system].of_base else asked

    def _run(self, system: str, workload: Workload) -> Outcome:
        host = self._host(ENTRIES[system].host)
        neighbours = Neighbours()
        outcome = host.run(workload, ENTRIES[system].how)
        outcome = replace(outcome, neighbour_seconds=neighbours.seconds())
        disturbed = f", others on {outcome.neighbour_cores:.2f} cores" if outcome.neighbour_cores > QUIET else ""
        say(f"{self._fixture.model} {workload.name} {system}: {outcome.tokens_per_second:.1f} tokens/s{disturbed}")
        if system == ORACLE:
            # The round's tokens are known now; an older answer stays, and this one is compared with it.
            reference(self._fixture, workload, lambda: outcome.outputs)
        return outcome

    def _host(self, name: str) -> Host:
        if name not in self._hosts:
            say(f"{self._fixture.model}: starting {name}")
            arguments: dict[str, object] = {"model": self._fixture.model, "folder": str(self._fixture.folder)}
            arguments |= {"memory": str(self._pool[0] or ""), "adapter_bytes": self._pool[1]}
            self._hosts[name] = self._stack.enter_context(Host(name, arguments, self._threads))
        return self._hosts[name]

    def _expected(self, workload: Workload) -> Tokens:
        return reference(self._fixture, workload, lambda: self._run(ORACLE, workload).outputs)
