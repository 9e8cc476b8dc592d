"""What only a machine with a GPU runs of `make bench-gpu`, with stand-ins that note what is asked of the device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import hardware
from benchmarks.gpu import graphs, machine

CUDA = torch.device("cuda")
MEGABYTE = 1 << 20


class Device:
    """A GPU whose clock ticks once for each call that it runs; `notes` are what it was asked, in order."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.clock = 0
        self.capturing: list[Callable[[], object]] | None = None

    def note(self, what: str) -> Callable[..., None]:
        return lambda *arguments: self.notes.append(what)

    def work(self) -> None:
        if self.capturing is not None:
            self.capturing.append(self.work)
            return
        self.notes.append("work")
        self.clock += 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    found = Device()

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            found.notes.append("record")
            self.time = found.clock

        def elapsed_time(self, end: Any) -> float:
            """Milliseconds."""
            return float(end.time - self.time)

    class Graph:
        def __init__(self) -> None:
            self.calls: list[Callable[[], object]] = []

        def replay(self) -> None:
            for call in self.calls:
                call()

    @contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        found.capturing = graph.calls
        yield
        found.capturing = None

    @contextmanager
    def stream(of: object) -> Iterator[None]:
        yield

    def make_stream() -> SimpleNamespace:
        return SimpleNamespace(wait_stream=found.note("wait"), synchronize=found.note("synchronize stream"))

    stand_ins: dict[str, Any] = {
        **{"Event": Event, "CUDAGraph": Graph, "graph": capture, "stream": stream, "Stream": make_stream},
        **{"current_stream": lambda: None, "synchronize": found.note("synchronize")},
        "get_device_properties": lambda of: SimpleNamespace(L2_cache_size=3 * MEGABYTE),
        "get_device_name": lambda of: "a GPU",
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    made = torch.zeros

    def zeros(count: int, device: torch.device) -> Any:
        assert count * made(1).itemsize == 6 * MEGABYTE
        assert device == CUDA
        return SimpleNamespace(sum=found.note("flush"))

    monkeypatch.setattr(torch, "zeros", zeros)
    machine._flusher.cache_clear()
    yield found
    machine._flusher.cache_clear()


def test_calls_are_captured_once_and_each_replay_begins_with_a_cold_cache(device: Device) -> None:
    """Twice the cache is read before the clock starts, and nothing between it and the end."""
    seconds = machine.seconds_of([device.work] * 4, CUDA, repeats=2)
    assert seconds == pytest.approx(1e-3)
    once, timed = ["work"] * 4, ["flush", "record", *["work"] * 4, "record"]
    assert device.notes == ["wait", *once, "synchronize stream", *once * 3, *timed * 2, "synchronize"]


def test_a_step_is_launched_as_it_is(device: Device) -> None:
    assert machine.step_seconds(device.work, CUDA, repeats=1) == pytest.approx(1e-3)
    assert device.notes == [*["work"] * 3, "flush", "record", "work", "record", "synchronize"]


def test_a_row_says_what_it_ran_on(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "version", lambda name: "3.6.0")
    about = machine.about(CUDA)
    assert (about["device"], about["triton"]) == ("a GPU", "3.6.0")


def test_files_without_a_checkout_have_an_unknown_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
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
