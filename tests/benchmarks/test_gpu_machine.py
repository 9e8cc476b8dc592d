"""What only a machine with a GPU runs of `make bench-gpu`, with stand-ins that note what is asked of the device."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import hardware
from benchmarks.gpu import graphs, machine, serving
from gpu_worker.cuda import place as placing
from gpu_worker.memory.geometry import PageGeometry
from tests.fake_cuda import CACHE_BYTES, Device

CUDA = torch.device("cuda")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    found = Device()
    found.install(monkeypatch)
    element = torch.zeros(1).itemsize

    def zeros(count: int, device: torch.device) -> Any:
        assert (count * element, device) == (2 * CACHE_BYTES, CUDA)
        return SimpleNamespace(sum=found.note("flush"))

    monkeypatch.setattr(torch, "zeros", zeros)
    machine._flusher.cache_clear()
    yield found
    machine._flusher.cache_clear()


def test_calls_are_captured_once_and_each_replay_begins_with_a_cold_cache(device: Device) -> None:
    """Twice the cache is read before the clock starts, and nothing between it and the end."""
    seconds = machine.seconds_of([device.work] * 4, CUDA, repeats=2)
    assert seconds == pytest.approx(1e-3)
    once = ["work"] * 4
    captured = ["wait", *once, "synchronize stream", "capture into its own, global"]
    timed = ["flush", "record", "replay", *once, "record"]
    assert device.notes == [*captured, *["replay", *once] * 3, *timed * 2, "synchronize"]


def test_a_step_is_launched_as_it_is(device: Device) -> None:
    assert machine.step_seconds(device.work, CUDA, repeats=1) == pytest.approx(1e-3)
    assert device.notes == [*["work"] * 3, "flush", "record", "work", "record", "synchronize"]


def test_a_row_says_what_it_ran_on(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "version", lambda name: "3.6.0")
    about = machine.about(CUDA)
    assert (about["device"], about["triton"]) == ("a GPU", "3.6.0")


def test_files_without_a_checkout_have_an_unknown_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert hardware.commit() != "unknown"
    monkeypatch.setattr(hardware, "ROOT", tmp_path)
    assert hardware.commit() == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.commit() == "unknown"


def test_waiting_is_an_error_inside_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def wait() -> None:
        with graphs._no_waits(CUDA):
            assert modes == ["error"]
            raise RuntimeError("called a synchronizing operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        wait()
    assert modes == ["error", "default"]


def test_a_served_load_has_the_pool_that_a_worker_would_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """One page less than there is room for: it is the executor's."""
    geometry = PageGeometry(num_layers=2, num_kv_heads=2, head_dim=8, element_bytes=2, page_size=16)
    asked: list[tuple[int, ...]] = []

    def room(decoder: object, of: PageGeometry, share: float, tokens: int, sequences: int) -> int:
        asked.append((tokens, sequences))
        return 10 * of.page_bytes + 5

    def place(decoder: object, of: PageGeometry, num_pages: int, sequences: int) -> tuple[str, str]:
        asked.append((num_pages, sequences))
        return "pool", "executor"

    monkeypatch.setattr(placing, "profiled_pool_bytes", room)
    monkeypatch.setattr(placing, "place", place)
    decoder: Any = SimpleNamespace(device=CUDA)
    found: Any = serving._placed(decoder, geometry, serving.FULL)
    assert found == ("pool", "executor")
    assert asked == [(2048, 128), (9, 128)]
