"""A tiny model with adapters, written and stored as the benchmarks do it, and what PEFT answers."""

from dataclasses import dataclass

import pytest

from benchmarks.kernels.models import Size
from benchmarks.serving.fixture import Fixture, prepare
from benchmarks.serving.outcome import Tokens
from benchmarks.serving.workload import BFLOAT16, Request, Workload, power_law

TINY = Size(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=96, vocab=131)
NUM_ADAPTERS = 6
# The first two once more, in bfloat16.
NARROW = (BFLOAT16, BFLOAT16 + 1)


@dataclass(frozen=True)
class Tiny:
    """Every adapter is asked for."""

    fixture: Fixture
    workload: Workload
    answers: Tokens


def short_workload() -> Workload:
    drawn = power_law(NUM_ADAPTERS, TINY.vocab, 2 * NUM_ADAPTERS).requests
    requests = tuple(
        Request(index % NUM_ADAPTERS, request.prompt[:40], min(12, request.output_tokens))
        for index, request in enumerate(drawn)
    )
    return Workload("tiny", NUM_ADAPTERS, requests)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    from benchmarks.serving.systems.peft import PeftSystem

    fixture = Fixture(tmp_path_factory.mktemp("bench"), "tiny", TINY)
    prepare(fixture, [*range(NUM_ADAPTERS), *NARROW])
    workload = short_workload()
    return Tiny(fixture, workload, PeftSystem(fixture, 1).run(workload, "mixed").outputs)
