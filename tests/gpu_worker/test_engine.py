"""The real engine: whoever shares the batch, however it is chunked, preempted or reloaded, the tokens are the same."""

import queue
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from gpu_worker import engine_main
from gpu_worker.config import EngineConfig
from tests.gpu_worker.engine_driver import EngineDriver
from tests.gpu_worker.tiny_model import TinyAdapter

pytestmark = pytest.mark.usefixtures("step_mode")

# name -> (prompt, adapter)
REQUESTS: Mapping[str, tuple[list[int], str]] = {
    "base": (list(range(2, 12)), ""),
    "base-long": (list(range(3, 60)), ""),
    "one": (list(range(2, 12)), "rank-1"),
    "three": (list(range(2, 12)), "rank-3"),
    "eight": (list(range(2, 12)), "rank-8"),
    "eight-long": (list(range(5, 50)), "rank-8"),
    "eight-short": ([7], "rank-8"),
}
MAX_TOKENS = 24


def run_together(driver: EngineDriver, **options: float) -> dict[str, list[int]]:
    for order_key, (name, (prompt, adapter)) in enumerate(REQUESTS.items()):
        driver.offer(name, prompt, adapter, max_tokens=MAX_TOKENS, order_key=order_key, seed=order_key, **options)
    driver.run()
    return {name: driver.tokens[name] for name in REQUESTS}


def run_alone(driver: EngineDriver, **options: float) -> dict[str, list[int]]:
    return {
        name: driver.generate(name, prompt, adapter, max_tokens=MAX_TOKENS, seed=seed, **options)
        for seed, (name, (prompt, adapter)) in enumerate(REQUESTS.items())
    }


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter]) -> dict[str, list[int]]:
    """Greedy tokens of each request in an engine with nobody else in it."""
    return run_alone(EngineDriver(tiny_checkpoint, tiny_adapters))


def test_every_adapter_changes_the_answer(alone: dict[str, list[int]]) -> None:
    answers = {tuple(alone[name]) for name in ("base", "one", "three", "eight")}
    assert len(answers) == 4


def test_a_mixed_batch_gives_each_its_own_answer(
    tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter], alone: dict[str, list[int]]
) -> None:
    assert run_together(EngineDriver(tiny_checkpoint, tiny_adapters)) == alone


def test_the_batch_was_mixed(tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter]) -> None:
    driver = EngineDriver(tiny_checkpoint, tiny_adapters)
    run_together(driver)
    # Now every adapter is resident, so nobody joins late.
    run_together(driver)
    assert max(stats.distinct_adapters for stats in driver.stats) == 4


def test_chunked_prefill_gives_the_same_tokens(
    tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter], alone: dict[str, list[int]]
) -> None:
    driver = EngineDriver(tiny_checkpoint, tiny_adapters, max_step_tokens=16, max_sequences=8)
    assert run_together(driver) == alone


def test_a_step_keeps_its_token_budget(tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter]) -> None:
    driver = EngineDriver(tiny_checkpoint, tiny_adapters, max_step_tokens=16, max_sequences=8)
    run_together(driver)
    assert max(stats.prefill_tokens + stats.decode_tokens for stats in driver.stats) == 16


class TestPreemption:
    """32 pages hold the largest sequence with its adapter, and not the others beside it."""

    NUM_PAGES = 32

    @pytest.fixture
    def driver(self, tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter]) -> EngineDriver:
        return EngineDriver(tiny_checkpoint, tiny_adapters, self.NUM_PAGES, max_step_tokens=32, max_sequences=8)

    def test_it_happens(self, driver: EngineDriver) -> None:
        run_together(driver)
        assert driver.preemptions > 0

    def test_it_changes_no_token(self, driver: EngineDriver, alone: dict[str, list[int]]) -> None:
        assert run_together(driver) == alone

    def test_it_changes_no_draw(
        self, driver: EngineDriver, tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter]
    ) -> None:
        undisturbed = run_alone(EngineDriver(tiny_checkpoint, tiny_adapters), temperature=0.8)
        assert run_together(driver, temperature=0.8) == undisturbed

    def test_all_finish(self, driver: EngineDriver) -> None:
        run_together(driver)
        assert driver.ended.keys() == REQUESTS.keys()

    def test_nothing_but_adapters_is_left(self, driver: EngineDriver) -> None:
        run_together(driver)
        memory = driver.memory
        assert (memory.free_pages + memory.evictable_pages, memory.kv_pages) == (self.NUM_PAGES, 0)


def test_usage_is_as_before_when_everything_has_finished(tiny_checkpoint: Path) -> None:
    driver = EngineDriver(tiny_checkpoint)
    before = driver.ready.memory
    driver.generate("s", list(range(20)))
    cached = driver.memory.prefix_pages
    assert cached == (20 + 8 - 1) // 4
    assert driver.memory.evictable_pages == cached == before.free_pages - driver.memory.free_pages


def test_one_at_a_time_still_serves_all(tiny_checkpoint: Path) -> None:
    driver = EngineDriver(tiny_checkpoint, max_sequences=1)
    for name in ("first", "second", "third"):
        driver.offer(name, [2, 3, 4])
    driver.run()
    assert driver.ended.keys() == {"first", "second", "third"}


def test_a_pool_for_one_at_a_time_still_serves_all(tiny_checkpoint: Path) -> None:
    driver = EngineDriver(tiny_checkpoint, num_pages=6)
    for name in ("first", "second", "third"):
        driver.offer(name, list(range(20)), max_tokens=4)
    driver.run()
    assert driver.ended.keys() == {"first", "second", "third"}


def test_each_position_is_a_draw_of_its_own(tiny_checkpoint: Path) -> None:
    tokens = EngineDriver(tiny_checkpoint).generate("s", [2, 3], max_tokens=40, temperature=10.0)
    # Nearly uniform over 64 tokens; one draw for all positions would give a handful.
    assert len(set(tokens)) > 20


class TestEviction:
    """24 pages: the largest adapter takes 14, so the three do not fit beside a sequence's 9."""

    @pytest.fixture
    def driver(self, tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter]) -> EngineDriver:
        return EngineDriver(tiny_checkpoint, tiny_adapters, 24)

    def generate(self, driver: EngineDriver, name: str, adapter: str) -> list[int]:
        return driver.generate(name, list(range(2, 12)), adapter, max_tokens=MAX_TOKENS)

    def test_a_cold_adapter_makes_room_for_another(self, driver: EngineDriver) -> None:
        self.generate(driver, "s", "rank-3")
        self.generate(driver, "t", "rank-8")
        assert driver.stats[-1].adapter_evictions == 1

    def test_a_reloaded_adapter_gives_the_same_tokens(self, driver: EngineDriver, alone: dict[str, list[int]]) -> None:
        first = self.generate(driver, "first", "rank-3")
        self.generate(driver, "between", "rank-8")
        assert self.generate(driver, "second", "rank-3") == first == alone["three"]

    def test_an_evicted_adapter_is_not_fetched_again(self, driver: EngineDriver) -> None:
        for name, adapter in (("s", "rank-3"), ("t", "rank-8"), ("u", "rank-3")):
            self.generate(driver, name, adapter)
        assert driver.asked == ["rank-3", "rank-8"]

    def test_the_scheduler_hears_of_loads_and_evictions(self, driver: EngineDriver) -> None:
        deltas = []
        for name, adapter in (("s", "rank-3"), ("t", "rank-8")):
            driver.offer(name, [2], adapter, max_tokens=MAX_TOKENS)
            while name not in driver.ended:
                deltas += [delta.sequence for delta in driver.step().report.residency]
                if driver.memory.loading_pages:
                    driver.wait_for_load()
        driver.offer("large", list(range(40)), max_tokens=50)
        deltas += [delta.sequence for delta in driver.step().report.residency]
        assert deltas == list(range(1, len(deltas) + 1))
        assert len(deltas) > 2


def test_a_pool_of_less_than_two_pages_is_refused(tiny_checkpoint: Path) -> None:
    config = EngineConfig(model=tiny_checkpoint, memory="1024", page_size=4)
    with pytest.raises(ValueError, match="takes 1024 bytes and at least two are needed"):
        engine_main.build(config, queue.SimpleQueue())


def test_a_pool_larger_than_the_machine_is_refused(tiny_checkpoint: Path) -> None:
    config = EngineConfig(model=tiny_checkpoint, memory="900000GiB")
    with pytest.raises(ValueError, match=r"memory is 900000GiB; this machine has [0-9.]+ GiB in all"):
        engine_main.build(config, queue.SimpleQueue())


@pytest.mark.parametrize(("built_for", "why"), [(None, "was built without it"), ("13.0", "no GPU answers")])
def test_a_gpu_that_is_not_there_is_refused(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, built_for: str | None, why: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    with pytest.raises(ValueError, match=f"device is cuda, but .*{why}.* or use --device cpu"):
        engine_main.build(EngineConfig(model=tiny_checkpoint, device="cuda"), queue.SimpleQueue())
