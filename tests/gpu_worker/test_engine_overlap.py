"""The output of a step is handled while the next one runs: tokens, adapters and books are those of steps in turn.

The device of these tests writes as late as it may: a step's KV lands when its result is asked for, which is after the
next one was planned, with whatever was freed, evicted and loaded meanwhile. So a page given away too early is
overwritten.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gpu_worker.host_storage import HostBlob
from gpu_worker.loader import Loader, _Job
from gpu_worker.memory.allocator import PageAllocator
from gpu_worker.memory.costs import CostModel
from loraplex.v1 import scheduler_pb2, types_pb2
from tests.gpu_worker.engine_driver import UNLIMITED_STEPS, EngineDriver, key
from tests.gpu_worker.step_modes import EARLY, IN_TURN, LATE, StepMode
from tests.gpu_worker.tiny_model import TinyAdapter

PROMPT = list(range(2, 12))
STOP, LENGTH = types_pb2.FINISH_REASON_STOP, types_pb2.FINISH_REASON_LENGTH
NUM_REQUESTS = 120
# The largest adapter takes 14, the largest request 15.
NUM_PAGES = 26


class Careless(PageAllocator):
    """Frees at once whatever step may still write."""

    def free(self, pages: Sequence[int], last_step: int) -> None:
        super().free(pages, self.completed_step)


def load_at_once(loader: Loader, adapter_version: str, blob: HostBlob, pages: list[int]) -> None:
    """Copies before anything else happens: what a step in flight still writes comes on top."""
    loader._on_done(loader._do(_Job(adapter_version, blob, pages)))


NewDriver = Callable[..., EngineDriver]


@pytest.fixture
def new_driver(tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter], monkeypatch: pytest.MonkeyPatch) -> NewDriver:
    def make(mode: StepMode, num_pages: int = 200, **options: Any) -> EngineDriver:
        monkeypatch.setattr(EngineDriver, "mode", mode)
        monkeypatch.setattr(Loader, "load", load_at_once)
        # What was measured decides who is evicted: here nothing is, so that a storm is the same every time.
        monkeypatch.setattr(CostModel, "prefilled", lambda *_: None)
        monkeypatch.setattr(CostModel, "loaded", lambda *_: None)
        return EngineDriver(tiny_checkpoint, tiny_adapters, num_pages, **options)

    return make


def request(draw: random.Random, number: int) -> dict[str, Any]:
    """Anything a request may ask for; the same number asks for the same."""
    sampled = draw.random() < 0.5
    return {
        "prompt": [2 + (number * 7 + position) % 60 for position in range(draw.randrange(1, 30))],
        "adapter": draw.choice(["", "", "rank-1", "rank-3", "rank-8"]),
        "max_tokens": draw.randrange(1, 30),
        "temperature": 1.0 if sampled else 0.0,
        "seed": number,
        # Many end where nobody could foresee it.
        "stop_token_ids": draw.sample(range(64), 6) if draw.random() < 0.7 else [],
        "min_tokens": draw.randrange(3),
        "output": types_pb2.OutputParams(logprobs=2) if draw.random() < 0.3 else None,
    }


class Storm:
    """Requests come, are aborted and preempted at random; a look at every adapter's bytes after every step."""

    def __init__(self, driver: EngineDriver, seed: int) -> None:
        self.driver = driver
        self.random = random.Random(seed)
        self.requests = [request(random.Random(number), number) for number in range(NUM_REQUESTS)]
        self.aborted: set[str] = set()
        self.damaged: set[str] = set()

    def run(self) -> None:
        for number, asked in enumerate(self.requests):
            self.driver.offer(f"r{number}", order_key=number, **asked)
            for _ in range(self.random.randrange(3)):
                self.step()
            self.disturb(self.random.choice([f"r{earlier}" for earlier in range(number + 1)][-8:]))
        for _ in range(UNLIMITED_STEPS):
            if len(self.driver.ended) == NUM_REQUESTS:
                return
            self.step()
        raise AssertionError("no end in sight")

    def disturb(self, name: str) -> None:
        if name in self.driver.ended or self.random.random() < 0.5:
            return
        if self.random.random() < 0.5:
            self.driver.command(preempt=scheduler_pb2.Preempt(key=key(name)))
            return
        self.aborted.add(name)
        self.driver.send(abort=scheduler_pb2.Abort(key=key(name), cause=scheduler_pb2.ABORT_CAUSE_CANCELLED))

    def step(self) -> None:
        self.driver.step()
        engine = self.driver.engine
        engine.check_integrity()
        for adapter in engine._memory.adapters:
            if not adapter.loading:
                content = self.driver.library[adapter.adapter_version].content
                held = engine._runner._pool.bytes[adapter.pages].flatten()[: len(content)]
                if held.numpy().tobytes() != content:
                    self.damaged.add(adapter.adapter_version)

    def answers(self) -> dict[str, tuple[list[int], int, list[bytes]]]:
        """Tokens, reason, and log-probabilities as bits, of whoever was not aborted."""
        found: dict[str, tuple[list[int], int, list[bytes]]] = {}
        for name in self.driver.ended.keys() - self.aborted:
            messages = [message for message in self.driver.messages if message.key.request_id == name]
            logprobs = [position.SerializeToString() for message in messages for position in message.logprobs]
            found[name] = self.driver.tokens.get(name, []), self.driver.ended[name].finish_reason, logprobs
        return found


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter]) -> dict[str, tuple[list[int], int, list[bytes]]]:
    """Every request of the storm by itself, with steps in turn."""
    storm = Storm(EngineDriver(tiny_checkpoint, tiny_adapters), 0)
    for number, asked in enumerate(storm.requests):
        storm.driver.offer(f"r{number}", **asked)
        storm.driver.run()
    return storm.answers()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", [EARLY, LATE], ids=["early", "late"])
def test_a_storm_of_requests_changes_no_bit_of_an_answer_or_an_adapter(
    mode: StepMode, seed: int, new_driver: NewDriver, alone: dict[str, tuple[list[int], int, list[bytes]]]
) -> None:
    storm = Storm(new_driver(mode, NUM_PAGES, max_step_tokens=24), seed)
    storm.run()
    answers = storm.answers()
    assert answers == {name: alone[name] for name in answers}
    assert storm.damaged == set()
    # Without these it would prove little.
    assert len(storm.aborted) > 20
    assert storm.driver.preemptions > 0
    assert storm.driver.stats[-1].adapter_evictions > 40
    assert sum(answer[1] == STOP for answer in answers.values()) > 20


def test_without_the_quarantine_a_step_in_flight_overwrites_adapters(
    new_driver: NewDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_worker.memory.manager.PageAllocator", Careless)
    damaged = set()
    for seed in range(3):
        storm = Storm(new_driver(LATE, NUM_PAGES, max_step_tokens=24), seed)
        storm.run()
        damaged |= storm.damaged
    assert damaged != set()


def test_a_sequence_that_ended_leaves_pages_that_wait_for_the_step_in_flight(new_driver: NewDriver) -> None:
    greedy = new_driver(IN_TURN).generate("s", PROMPT, max_tokens=24)
    driver = new_driver(LATE)
    driver.offer("s", PROMPT, max_tokens=24, stop_token_ids=[greedy[3]])
    while "s" not in driver.ended:
        driver.step()
    assert driver.memory.quarantined_pages > 0
    driver.step()
    assert (driver.memory.quarantined_pages, driver.memory.kv_pages) == (0, 0)


def test_a_token_too_many_is_computed_behind_a_stop_token_and_given_to_nobody(new_driver: NewDriver) -> None:
    greedy = new_driver(IN_TURN).generate("s", PROMPT, max_tokens=24)
    driver = new_driver(LATE)
    assert driver.generate("s", PROMPT, max_tokens=24, stop_token_ids=[greedy[3]]) == greedy[:4]
    assert driver.ended["s"].finish_reason == STOP
    assert driver.ended["s"].usage.completion_tokens == 4
    # The prompt's step draws the first token.
    assert sum(stats.decode_tokens for stats in driver.stats) == 4


def test_no_token_is_computed_behind_one_that_must_be_the_last(new_driver: NewDriver) -> None:
    driver = new_driver(LATE)
    driver.generate("s", PROMPT, max_tokens=5)
    assert sum(stats.decode_tokens for stats in driver.stats) == 4
    assert driver.ended["s"].finish_reason == LENGTH


def test_a_step_is_launched_before_the_one_before_it_is_handled(new_driver: NewDriver) -> None:
    driver = new_driver(LATE)
    driver.offer("s", PROMPT, max_tokens=3)
    told = [sum(len(batch.sequences) for batch in driver.step().tokens) for _ in range(4)]
    assert told == [0, 1, 1, 1]


def test_penalties_count_the_token_that_is_still_on_the_device(new_driver: NewDriver) -> None:
    """A repetition penalty so large that no token comes twice, as far as tokens are known."""

    def answer(mode: StepMode) -> list[int]:
        driver = new_driver(mode)
        offer = scheduler_pb2.Offer(
            request=types_pb2.RequestSpec(
                key=key("s"),
                gateway_id="gateway",
                prompt_token_ids=PROMPT,
                sampling=types_pb2.SamplingParams(temperature=0.0, repetition_penalty=10.0, frequency_penalty=2.0),
                stopping=types_pb2.StoppingParams(max_tokens=20, ignore_eos=True),
            ),
            order_key=1,
        )
        driver.command(offer=offer)
        driver.run()
        return driver.tokens["s"]

    assert answer(LATE) == answer(EARLY) == answer(IN_TURN)


def test_prompt_logprobs_of_chunks_in_flight_are_described_once(new_driver: NewDriver) -> None:
    def described(mode: StepMode) -> list[bytes]:
        driver = new_driver(mode, max_step_tokens=16)
        driver.offer("s", list(range(2, 60)), max_tokens=3, output=types_pb2.OutputParams(prompt_logprobs=2))
        driver.run()
        return [part.SerializeToString() for message in driver.messages for part in message.prompt_logprobs]

    assert described(LATE) == described(IN_TURN)
    assert len(described(LATE)) == 58
