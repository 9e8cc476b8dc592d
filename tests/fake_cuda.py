"""A GPU of notes in place of `torch.cuda`: it runs what it is given at once and remembers what was asked of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

CACHE_BYTES = 3 << 20


class Device:
    """Its clock ticks once for each call that it runs; `notes` are what it was asked, in order."""

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

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Streams, events and graphs of `torch.cuda` are this device's."""
        device = self

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                device.notes.append("record")
                self.time = device.clock

            def elapsed_time(self, end: Any) -> float:
                """Milliseconds."""
                return float(end.time - self.time)

        class Graph:
            def __init__(self) -> None:
                self.calls: list[Callable[[], object]] = []

            def replay(self) -> None:
                device.notes.append("replay")
                for call in self.calls:
                    call()

        @contextmanager
        def capture(graph: Graph, pool: str = "its own", capture_error_mode: str = "global") -> Iterator[None]:
            device.notes.append(f"capture into {pool}, {capture_error_mode}")
            device.capturing = graph.calls
            yield
            device.capturing = None

        @contextmanager
        def stream(of: object) -> Iterator[None]:
            yield

        def make_stream() -> SimpleNamespace:
            return SimpleNamespace(wait_stream=device.note("wait"), synchronize=device.note("synchronize stream"))

        stand_ins: dict[str, Any] = {
            **{"Event": Event, "CUDAGraph": Graph, "graph": capture, "stream": stream, "Stream": make_stream},
            **{"current_stream": make_stream, "synchronize": device.note("synchronize")},
            "graph_pool_handle": lambda: "a pool",
            "get_device_properties": lambda of: SimpleNamespace(L2_cache_size=CACHE_BYTES),
            "get_device_name": lambda of: "a GPU",
        }
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
