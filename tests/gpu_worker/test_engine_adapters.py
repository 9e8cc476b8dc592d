"""Adapters on their way into pages: a step never waits for them, and a bad one fails its own requests only."""

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from gpu_worker import engine_main
from gpu_worker.loader import Loader, _Job
from loraplex.v1 import engine_pb2, types_pb2
from tests.gpu_worker.engine_driver import EngineDriver
from tests.gpu_worker.tiny_model import TinyAdapter, write_adapter

pytestmark = pytest.mark.usefixtures("step_mode")

PROMPT = list(range(2, 12))
ERROR = types_pb2.FINISH_REASON_ERROR


class GatedLoader(Loader):
    """A copying thread that stands until the test lets it go."""

    gate = threading.Event()

    def _copy(self, job: _Job) -> str:
        assert self.gate.wait(timeout=30)
        return super()._copy(job)


@pytest.fixture
def driver(tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter]) -> EngineDriver:
    return EngineDriver(tiny_checkpoint, tiny_adapters)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    monkeypatch.setattr(engine_main, "Loader", GatedLoader)
    GatedLoader.gate.clear()
    yield GatedLoader.gate
    GatedLoader.gate.set()


def free_and_evictable(driver: EngineDriver) -> int:
    return driver.memory.free_pages + driver.memory.evictable_pages


def test_a_step_does_not_wait_for_a_load(
    gate: threading.Event, tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter]
) -> None:
    driver = EngineDriver(tiny_checkpoint, tiny_adapters)
    driver.offer("loading", PROMPT, "rank-8")
    driver.offer("base", PROMPT, max_tokens=20)
    while "base" not in driver.ended:
        driver.step()
    assert "loading" not in driver.tokens
    assert driver.memory.loading_pages == 14


def test_a_sequence_joins_after_its_load(
    gate: threading.Event, tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter]
) -> None:
    driver = EngineDriver(tiny_checkpoint, tiny_adapters)
    driver.offer("loading", PROMPT, "rank-8")
    for _ in range(3):
        driver.step()
    gate.set()
    driver.run()
    assert len(driver.tokens["loading"]) == 8


class MuteLoader(GatedLoader):
    """A copying thread that has no turn to say that it has copied until the test lets it go."""

    copied = threading.Event()

    def _copy(self, job: _Job) -> str:
        failure = Loader._copy(self, job)
        self.copied.set()
        assert self.gate.wait(timeout=30)
        return failure


def test_a_sequence_joins_the_step_after_its_copy_whoever_says_so(
    gate: threading.Event, tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_main, "Loader", MuteLoader)
    MuteLoader.copied.clear()
    driver = EngineDriver(tiny_checkpoint, tiny_adapters)
    driver.offer("loading", PROMPT, "rank-8")
    driver.offer("base", PROMPT, max_tokens=20)
    while not driver.memory.loading_pages:
        driver.step()
    assert MuteLoader.copied.wait(timeout=30)
    arrived = engine_main.arrivals(queue.SimpleQueue(), driver.engine)
    assert arrived is not None
    driver.arrive(arrived)
    driver.run()
    assert len(driver.tokens["loading"]) == 8


def test_the_engine_rests_while_everybody_waits_for_a_load(driver: EngineDriver) -> None:
    driver.hold_loads = True
    driver.offer("loading", PROMPT, "rank-8")
    driver.run()
    assert not driver.engine.busy


def test_an_adapter_is_asked_for_once(driver: EngineDriver) -> None:
    for name in ("s", "t", "u"):
        driver.offer(name, PROMPT, "rank-3")
    driver.run()
    assert driver.asked == ["rank-3"]


def test_a_prefetched_adapter_is_asked_for_before_its_first_request(driver: EngineDriver) -> None:
    driver.command(prefetch={"tenant": "default", "adapter_version": "rank-3"})
    driver.run()
    assert driver.asked == ["rank-3"]


def test_a_load_that_nobody_waits_for_any_more_ends_well(driver: EngineDriver) -> None:
    driver.hold_loads = True
    driver.offer("s", PROMPT, "rank-3")
    driver.run()
    driver.command(abort={"key": {"request_id": "s"}})
    driver.finish_loads()
    driver.run()
    assert (driver.memory.adapter_pages, free_and_evictable(driver)) == (3, 200)


class TestOneBadAdapter:
    """`bad` fails; a sequence of the base and one of another adapter in the same batches do not notice."""

    @pytest.fixture
    def undisturbed(self, driver: EngineDriver) -> dict[str, list[int]]:
        return {name: driver.generate(name, PROMPT, adapter) for name, adapter in (("base", ""), ("good", "rank-3"))}

    def run(self, driver: EngineDriver) -> None:
        for name, adapter in (("bad", "bad"), ("base", ""), ("good", "rank-3"), ("bad too", "bad")):
            driver.offer(name, PROMPT, adapter)
        driver.run()

    @pytest.fixture(params=["not-found", "corrupted", "short", "missing", "other-base", "too-many-layers", "too-large"])
    def failed(
        self,
        request: pytest.FixtureRequest,
        tiny_checkpoint: Path,
        tiny_adapters: list[TinyAdapter],
        tmp_path: Path,
    ) -> tuple[EngineDriver, str]:
        """An engine in which `bad` has failed, and the reason expected."""
        good = write_adapter(tmp_path, "bad", lora_rank=8)
        reason, library = "ADAPTER_CORRUPT", [*tiny_adapters]
        if request.param == "not-found":
            reason = "ADAPTER_NOT_FOUND"
        elif request.param == "corrupted":
            library.append(good.corrupted(tmp_path))
        elif request.param == "short":
            good.path.write_bytes(good.content[:-1])
            library.append(good)
        elif request.param == "missing":
            good.path.unlink()
            library.append(good)
        elif request.param == "other-base":
            reason = "BASE_MODEL_MISMATCH"
            library.append(write_adapter(tmp_path, "bad", lora_rank=8, width=40))
        elif request.param == "too-many-layers":
            reason = "BASE_MODEL_MISMATCH"
            library.append(write_adapter(tmp_path, "bad", lora_rank=8, num_layers=3))
        else:
            reason = "ADAPTER_TOO_LARGE"
            library.append(write_adapter(tmp_path, "bad", lora_rank=256))
        driver = EngineDriver(tiny_checkpoint, library)
        self.run(driver)
        return driver, reason

    def test_its_requests_fail_with_the_reason(self, failed: tuple[EngineDriver, str]) -> None:
        driver, reason = failed
        found = {
            name: (driver.ended[name].finish_reason, driver.ended[name].error.reason) for name in ("bad", "bad too")
        }
        assert found == {"bad": (ERROR, reason), "bad too": (ERROR, reason)}

    def test_the_others_finish_unchanged(
        self, failed: tuple[EngineDriver, str], undisturbed: dict[str, list[int]]
    ) -> None:
        driver, _ = failed
        assert {name: driver.tokens[name] for name in ("base", "good")} == undisturbed

    def test_its_pages_are_free(self, failed: tuple[EngineDriver, str]) -> None:
        driver, _ = failed
        assert (free_and_evictable(driver), driver.memory.adapter_pages) == (200, 3)

    def test_the_next_request_asks_for_it_anew(self, failed: tuple[EngineDriver, str]) -> None:
        driver, _ = failed
        driver.asked.clear()
        driver.offer("again", PROMPT, "bad")
        driver.run()
        assert driver.asked == ["bad"]


def test_an_adapter_that_comes_whole_the_second_time_serves(tiny_checkpoint: Path, tmp_path: Path) -> None:
    whole = write_adapter(tmp_path, "a", lora_rank=8)
    driver = EngineDriver(tiny_checkpoint, [whole.corrupted(tmp_path)])
    driver.offer("first", PROMPT, "a")
    driver.run()
    driver.library["a"] = whole
    assert len(driver.generate("second", PROMPT, "a")) == 8


def test_a_layout_of_an_unknown_dtype_fails_its_requests_only(
    driver: EngineDriver, tiny_adapters: list[TinyAdapter]
) -> None:
    driver.library.clear()
    driver.offer("s", PROMPT, "from the future")
    driver.step()
    driver._arrivals.clear()
    fetched = tiny_adapters[0].fetched()
    fetched.adapter_version = "from the future"
    fetched.layout.dtype = types_pb2.DTYPE_UNSPECIFIED
    driver.send(adapter_fetched=fetched)
    driver.run()
    assert driver.ended["s"].error.reason == "ADAPTER_CORRUPT"


class TestMemoryCommands:
    def ask(self, driver: EngineDriver, **command: object) -> engine_pb2.MemoryReply:
        driver.send(memory={"call_id": 7, **command})
        driver.run()
        return driver.replies[-1]

    def test_usage_counts_what_is_held(self, driver: EngineDriver) -> None:
        driver.generate("s", PROMPT, "rank-3")
        reply = self.ask(driver, get_usage={})
        assert (reply.call_id, reply.memory.adapter_pages, reply.resident_adapters) == (7, 3, 1)

    def test_a_cold_adapter_is_evicted(self, driver: EngineDriver) -> None:
        driver.generate("s", PROMPT, "rank-3")
        assert self.ask(driver, evict={"adapter_version": "rank-3"}).freed_pages == 3

    def test_an_adapter_in_use_is_not_evicted(self, driver: EngineDriver) -> None:
        driver.generate("s", PROMPT, "rank-3")
        driver.offer("t", PROMPT, "rank-3")
        driver.step()
        assert self.ask(driver, evict={"adapter_version": "rank-3"}).error.reason == "ADAPTER_IN_USE"

    def test_an_unknown_adapter_is_not_found(self, driver: EngineDriver) -> None:
        error = self.ask(driver, pin={"adapter_version": "nobody"}).error
        assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND.value[0], "ADAPTER_NOT_RESIDENT")

    def test_a_pinned_adapter_stays_until_it_is_unpinned(self, driver: EngineDriver) -> None:
        driver.generate("s", PROMPT, "rank-3")
        self.ask(driver, pin={"adapter_version": "rank-3"})
        refused = self.ask(driver, evict={"adapter_version": "rank-3"}).error.reason
        self.ask(driver, unpin={"adapter_version": "rank-3"})
        assert (refused, self.ask(driver, evict={"adapter_version": "rank-3"}).freed_pages) == ("ADAPTER_IN_USE", 3)
