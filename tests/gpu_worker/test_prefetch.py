"""Adapters climb in the order of the queue, ahead of admission, and hurt nobody on their way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from gpu_worker.batch import ForwardBatch
from gpu_worker.memory.costs import CostModel
from gpu_worker.models.recorded import RecordedDecoder
from tests.gpu_worker.engine_driver import EngineDriver, new_offer
from tests.gpu_worker.tiny_model import TinyAdapter, write_adapter

PROMPT = list(range(2, 10))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[TinyAdapter]:
    """Twenty of three pages each."""
    folder = tmp_path_factory.mktemp("prefetch")
    return [write_adapter(folder, f"a{number}", lora_rank=3) for number in range(20)]


def occupied(checkpoint: Path, adapters: list[TinyAdapter], num_pages: int = 200) -> EngineDriver:
    """An engine whose one place is taken by a long sequence of the base model."""
    driver = EngineDriver(checkpoint, adapters, num_pages, max_sequences=1)
    driver.offer("long", [2], max_tokens=80, order_key=0)
    driver.step()
    return driver


def resident(driver: EngineDriver) -> set[str]:
    driver.send(memory={"call_id": 1, "list_resident": {}})
    driver.step()
    return {adapter.adapter_version for adapter in driver.replies[-1].resident if adapter.tier == 3}


def steps(driver: EngineDriver, number: int) -> None:
    """So many steps; every load that was started ends before the next."""
    for _ in range(number):
        driver.step()
        if driver.memory.loading_adapters:
            driver.wait_for_load()


def test_the_queues_adapters_are_in_pages_before_their_requests_are_admitted(
    tiny_checkpoint: Path, adapters: list[TinyAdapter]
) -> None:
    driver = occupied(tiny_checkpoint, adapters)
    for number in range(4):
        driver.offer(f"s{number}", PROMPT, f"a{number}", order_key=number + 1)
    steps(driver, 8)
    assert "long" not in driver.ended
    assert resident(driver) == {"a0", "a1", "a2", "a3"}


def test_then_nobody_waits_for_a_load(tiny_checkpoint: Path, adapters: list[TinyAdapter]) -> None:
    driver = occupied(tiny_checkpoint, adapters)
    driver.offer("s", PROMPT, "a0", order_key=1)
    steps(driver, 3)
    driver.run()
    assert driver.ended["s"].usage.load_seconds == 0.0


def test_the_head_of_the_queue_goes_first(tiny_checkpoint: Path, adapters: list[TinyAdapter]) -> None:
    driver = occupied(tiny_checkpoint, adapters)
    for number in range(9, -1, -1):
        driver.offer(f"s{number}", PROMPT, f"a{number}", order_key=number + 1)
    driver.step()
    assert driver.asked == [f"a{number}" for number in range(8)]


def test_adapters_that_nobody_runs_with_yet_take_a_share_of_the_pool_only(
    tiny_checkpoint: Path, adapters: list[TinyAdapter]
) -> None:
    driver = occupied(tiny_checkpoint, adapters, num_pages=40)
    for number in range(10):
        driver.offer(f"s{number}", PROMPT, f"a{number}", order_key=number + 1)
    steps(driver, 30)
    assert resident(driver) == {"a0", "a1", "a2"}


def test_a_colder_adapter_makes_room_and_one_that_is_wanted_does_not(
    tiny_checkpoint: Path, adapters: list[TinyAdapter]
) -> None:
    driver = EngineDriver(tiny_checkpoint, adapters, num_pages=28, max_sequences=1)
    for number in range(6):
        driver.generate(f"warm{number}", [2], f"a{number}", max_tokens=1)
    driver.offer("long", [2], max_tokens=60, order_key=0)
    driver.step()
    driver.offer("s0", PROMPT, "a0", order_key=1)
    driver.offer("s9", PROMPT, "a9", order_key=2)
    while "a9" not in resident(driver):
        steps(driver, 1)
    assert "a0" in resident(driver)
    assert "long" not in driver.ended


def test_a_hint_takes_free_pages_only(tiny_checkpoint: Path, adapters: list[TinyAdapter]) -> None:
    driver = EngineDriver(tiny_checkpoint, adapters, num_pages=23)
    for number in range(7):
        driver.generate(f"warm{number}", [2], f"a{number}", max_tokens=1)
    before = resident(driver)
    driver.command(prefetch={"tenant": "default", "adapter_version": "a9"})
    steps(driver, 4)
    assert (resident(driver), driver.asked[-1]) == (before, "a9")


def test_a_hint_on_an_idle_engine_ends_in_pages(tiny_checkpoint: Path, adapters: list[TinyAdapter]) -> None:
    driver = EngineDriver(tiny_checkpoint, adapters)
    for number in range(12):
        driver.command(prefetch={"tenant": "default", "adapter_version": f"a{number}"})
    driver.run()
    driver.run()
    assert resident(driver) == {f"a{number}" for number in range(12)}


def test_an_adapter_that_left_the_host_tier_is_fetched_again_when_its_turn_comes(
    tiny_checkpoint: Path, adapters: list[TinyAdapter]
) -> None:
    """A host tier of two adapters and a pool of a few: twenty requests for twenty adapters are all answered."""
    size = adapters[0].layout.total_bytes
    driver = EngineDriver(tiny_checkpoint, adapters, num_pages=24, max_sequences=2, host_memory=str(2 * size))
    for number in range(20):
        driver.offer(f"s{number}", PROMPT, f"a{number}", order_key=number)
    driver.run()
    assert driver.ended.keys() == {f"s{number}" for number in range(20)}
    assert not any(last.HasField("error") for last in driver.ended.values())
    assert driver.memory.host_adapter_bytes <= driver.memory.host_limit_bytes == 2 * size


def test_usage_agrees_with_the_files(tiny_checkpoint: Path, adapters: list[TinyAdapter]) -> None:
    driver = EngineDriver(tiny_checkpoint, adapters)
    for number in range(5):
        driver.generate(f"s{number}", [2], f"a{number}", max_tokens=1)
    sizes = sum(adapter.path.stat().st_size for adapter in adapters[:5])
    assert (driver.memory.adapter_bytes, driver.memory.host_adapter_bytes) == (sizes, sizes)
    driver.send(memory={"call_id": 1, "evict": {"adapter_version": "a0"}})
    driver.run()
    assert driver.memory.adapter_bytes == sum(adapter.path.stat().st_size for adapter in adapters[1:5])


def test_changes_of_both_tiers_are_numbered_without_gaps(tiny_checkpoint: Path, adapters: list[TinyAdapter]) -> None:
    driver = EngineDriver(tiny_checkpoint, adapters, num_pages=24, host_memory=str(2 * adapters[0].layout.total_bytes))
    for number in range(12):
        driver.generate(f"s{number}", [2], f"a{number}", max_tokens=1)
    numbers = [delta.sequence for delta in driver.residency]
    assert numbers == list(range(1, len(numbers) + 1))
    tiers = {delta.adapter.adapter_version: delta.adapter.tier for delta in driver.residency}
    driver.send(memory={"call_id": 1, "list_resident": {}})
    driver.run()
    here = {adapter.adapter_version: adapter.tier for adapter in driver.replies[-1].resident}
    assert here == {version: tier for version, tier in tiers.items() if tier != 1}


def while_steps_compute(monkeypatch: pytest.MonkeyPatch, call: Callable[[], None]) -> None:
    """Has `call` made whenever the decoder runs."""
    forward = RecordedDecoder.forward

    def computing(decoder: RecordedDecoder, batch: ForwardBatch) -> Tensor:
        call()
        return forward(decoder, batch)

    monkeypatch.setattr(RecordedDecoder, "forward", computing)


def in_host_tier(checkpoint: Path, adapters: list[TinyAdapter], number: int, **options: Any) -> EngineDriver:
    """An engine that has the first adapters on the host, none in pages, and runs a long sequence of the base model."""
    driver = EngineDriver(checkpoint, adapters, **options)
    for index in range(number):
        driver.generate(f"warm{index}", [2], f"a{index}", max_tokens=1)
        driver.send(memory={"call_id": 1, "evict": {"adapter_version": f"a{index}"}})
        driver.run()
    driver.offer("long", [2], max_tokens=60, order_key=0)
    driver.step()
    return driver


@pytest.mark.parametrize("heard", [True, False])
def test_who_comes_while_a_step_computes_finds_the_adapter_there_when_it_is_over(
    tiny_checkpoint: Path, adapters: list[TinyAdapter], monkeypatch: pytest.MonkeyPatch, heard: bool
) -> None:
    driver = in_host_tier(tiny_checkpoint, adapters, 1)
    if heard:
        with monkeypatch.context() as patch:
            while_steps_compute(patch, lambda: driver.engine.foresee([new_offer("s", PROMPT, "a0")]))
            driver.step()
        driver.wait_for_load()
    driver.offer("s", PROMPT, "a0", max_tokens=2)
    driver.run()
    assert (driver.ended["s"].usage.load_seconds == 0.0) == heard


def test_who_comes_between_what_is_applied_and_the_step_finds_the_adapter_there_when_that_is_over(
    tiny_checkpoint: Path, adapters: list[TinyAdapter]
) -> None:
    """Its offer is applied one step later; nothing is copied before a step computes."""
    driver = in_host_tier(tiny_checkpoint, adapters, 1)
    driver.engine.foresee([new_offer("s", PROMPT, "a0")])
    assert driver.engine._memory.adapters.get("a0") is None
    driver.step()
    driver.wait_for_load()
    driver.offer("s", PROMPT, "a0", max_tokens=2)
    driver.run()
    assert driver.ended["s"].usage.load_seconds == 0.0


def test_who_comes_while_others_wait_starts_nothing(
    tiny_checkpoint: Path, adapters: list[TinyAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = in_host_tier(tiny_checkpoint, adapters, 1, max_sequences=1)
    driver.offer("first", PROMPT, order_key=1)
    while_steps_compute(monkeypatch, lambda: driver.engine.foresee([new_offer("s", PROMPT, "a0")]))
    driver.step()
    assert driver.memory.loading_pages == 0


@pytest.mark.parametrize(
    ("messages", "gone"),
    [
        pytest.param([["a3"]], "a0", id="alone"),
        pytest.param([["a0", "a3"]], "a1", id="behind"),
        pytest.param([["a3", "a0"]], "a1", id="before"),
        pytest.param([["a0"], ["a3"]], "a1", id="in two messages"),
    ],
)
def test_those_who_come_together_do_not_take_each_others_adapter(
    tiny_checkpoint: Path,
    adapters: list[TinyAdapter],
    monkeypatch: pytest.MonkeyPatch,
    messages: list[list[str]],
    gone: str,
) -> None:
    """Equal costs and equal demand: a0 was let go of first and goes first, unless it is wanted too."""
    monkeypatch.setattr(CostModel, "loaded", lambda *measured: None)
    driver = EngineDriver(tiny_checkpoint, adapters, num_pages=12)
    for version in ("a3", "a0", "a1", "a2"):
        driver.generate(f"warm {version}", [2], version, max_tokens=1)
    assert resident(driver) == {"a0", "a1", "a2"}
    driver.offer("long", [2], order_key=0)

    def hear() -> None:
        for versions in messages:
            driver.engine.foresee([new_offer(f"wants {version}", PROMPT, version) for version in versions])

    with monkeypatch.context() as patch:
        while_steps_compute(patch, hear)
        driver.step()
    driver.wait_for_load()
    assert resident(driver) == {"a0", "a1", "a2", "a3"} - {gone}


def test_tokens_do_not_depend_on_what_is_loaded_while_steps_compute(
    tiny_checkpoint: Path, adapters: list[TinyAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool of a few adapters, so that what comes in while a step computes takes what others left."""

    def answers(ahead: int) -> dict[str, list[int]]:
        driver = in_host_tier(tiny_checkpoint, adapters, 20, num_pages=34, max_sequences=3)
        comes = iter(range(1000))

        def hear() -> None:
            number = next(comes)
            driver.engine.foresee([new_offer("later", PROMPT, f"a{(number + place) % 20}") for place in range(ahead)])

        with monkeypatch.context() as patch:
            while_steps_compute(patch, hear)
            for number in range(20):
                driver.offer(f"s{number}", [*PROMPT, number], f"a{number}", order_key=number + 1)
                driver.step()
            driver.run()
        return driver.tokens

    assert answers(ahead=3) == answers(ahead=0)
