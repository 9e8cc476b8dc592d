"""An operator's pin never starves a request: whichever comes second and cannot be had beside the other is refused."""

from pathlib import Path

import pytest

from loraplex.v1 import engine_pb2
from tests.gpu_worker.engine_driver import EngineDriver
from tests.gpu_worker.tiny_model import TinyAdapter

pytestmark = pytest.mark.usefixtures("step_mode")

# The largest adapter takes 14 of them.
NUM_PAGES = 24
# 16 pages with its answer: more than the pool has beside that adapter.
LONG = [3] * 56


@pytest.fixture
def driver(tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter]) -> EngineDriver:
    driver = EngineDriver(tiny_checkpoint, tiny_adapters, NUM_PAGES)
    driver.generate("loads it", [2, 3], "rank-8")
    return driver


def pin(driver: EngineDriver, adapter: str = "rank-8") -> engine_pb2.MemoryReply:
    driver.send(memory={"call_id": 1, "pin": {"adapter_version": adapter}})
    driver.step()
    return driver.replies[-1]


def test_a_request_that_cannot_run_beside_a_pinned_adapter_is_refused_with_the_numbers(driver: EngineDriver) -> None:
    assert not pin(driver).HasField("error")
    driver.offer("long", LONG)
    driver.offer("short", [2, 3], order_key=2)
    driver.run()
    error = driver.ended["long"].error
    assert error.reason == "REQUEST_TOO_LARGE"
    assert "needs 16 pages for 64 tokens" in error.message
    assert "has 24, of which operators pinned 14" in error.message
    assert len(driver.tokens["short"]) == 8


def test_a_request_of_the_pinned_adapter_itself_does_not_pay_for_it_twice(driver: EngineDriver) -> None:
    pin(driver)
    assert len(driver.generate("s", [2] * 20, "rank-8")) == 8


def test_a_pin_that_a_request_here_could_not_bear_is_refused(driver: EngineDriver) -> None:
    driver.offer("long", LONG)
    refused = pin(driver)
    driver.run()
    assert refused.error.reason == "ADAPTER_IN_USE"
    assert "needs 16 pages" in refused.error.message
    assert len(driver.tokens["long"]) == 8


def test_a_refused_pin_leaves_the_adapter_to_yield(driver: EngineDriver) -> None:
    driver.offer("long", LONG)
    pin(driver)
    driver.run()
    assert driver.memory.adapter_pages == 0


@pytest.mark.parametrize("again", [False, True])
def test_the_step_of_a_pin_reports_it(driver: EngineDriver, again: bool) -> None:
    for _ in range(1 + again):
        pin(driver)
    assert driver.memory.pinned_adapters == 1
    driver.send(memory={"call_id": 2, "unpin": {"adapter_version": "rank-8"}})
    driver.step()
    assert driver.memory.pinned_adapters == 0


def test_a_refused_pin_is_not_reported(driver: EngineDriver) -> None:
    driver.offer("long", LONG)
    pin(driver)
    assert driver.memory.pinned_adapters == 0


def test_the_same_request_runs_after_an_unpin(driver: EngineDriver) -> None:
    pin(driver)
    driver.send(memory={"call_id": 2, "unpin": {"adapter_version": "rank-8"}})
    driver.step()
    assert len(driver.generate("long", LONG)) == 8
