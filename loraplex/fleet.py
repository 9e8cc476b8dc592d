"""The four services as processes of one machine: what `loraplex up`, the demo and the end-to-end tests start.

1. The adapter store and the scheduler start.
2. When both are ready, the workers and the gateway start.
3. When all are ready, the fleet is.
4. On the way out all get SIGTERM, the gateway first and the store last, and SIGKILL when they take too long.
"""

import fcntl
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from loraplex.process import FleetError, ServiceProcess, last_message

SERVICES = ("adapter_store", "scheduler", "gpu_worker", "gateway")
_HOST = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class FleetOptions:
    """How to start a fleet. Empty and 0 leave a choice to the service."""

    model: Path
    """Folder of a Hugging Face checkpoint."""
    model_name: str = ""
    """What clients see, and what adapters should have recorded as their base; empty takes the folder's name."""
    data_dir: Path
    """Adapters, the workers' caches, and one log per service under `logs/`. Used by one fleet at a time."""
    workers: int = 1
    device: str = ""
    dtype: str = ""
    memory: str = ""
    """Of the page pool of each worker, for instance `512MiB`."""
    port: int = 0
    """Of the gateway; 0 takes a free one. All other ports are free ones."""
    ready_timeout_seconds: float = 300.0
    stop_timeout_seconds: float = 15.0
    extra: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """More arguments, by service (`gpu_worker`: all workers) or by process (`worker-1`). They win."""
    services_folder: Path | None = None
    """The folder that holds the service packages; None finds it."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """A service that is ready; addresses are `HOST:PORT`."""

    name: str
    pid: int
    address: str
    metrics_address: str
    log: Path


class Fleet:
    """Starts a fleet on entering, stops it on leaving.

        with Fleet(FleetOptions(model=Path("model"), data_dir=Path("data"))) as fleet:
            Client(fleet.gateway.address)

    Entering raises FleetError when a service does not become ready; nothing is left running then.
    """

    def __init__(self, options: FleetOptions) -> None:
        self.options = options
        self.services: dict[str, Service] = {}
        """By process name: adapter_store, scheduler, worker-0, worker-1, ..., gateway."""
        self._processes: dict[str, ServiceProcess] = {}
        self._lock = ExitStack()

    @property
    def gateway(self) -> Service:
        return self.services["gateway"]

    @property
    def scheduler(self) -> Service:
        return self.services["scheduler"]

    @property
    def adapter_store(self) -> Service:
        return self.services["adapter_store"]

    @property
    def workers(self) -> list[Service]:
        return [service for name, service in self.services.items() if name.startswith("worker-")]

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Returns after `timeout_seconds`; raises FleetError as soon as a service ends."""
        ended = wait([process.exited for process in self._processes.values()], timeout_seconds, FIRST_COMPLETED).done
        for process in self._processes.values():
            if process.exited in ended:
                process.ready.result()
                code = process.exited.result()
                raise FleetError(
                    f"{process.name} ended with code {code}: {last_message(process.log)} (see {process.log})"
                )

    def __enter__(self) -> Self:
        self._check_model()
        folder = self.options.services_folder or find_services()
        self._take_data_dir()
        deadline = time.monotonic() + self.options.ready_timeout_seconds
        try:
            self._start(folder, "adapter_store", "adapter_store", self._store_arguments())
            self._start(folder, "scheduler", "scheduler", [])
            self._await_ready(deadline)
            for index in range(self.options.workers):
                self._start(folder, "gpu_worker", f"worker-{index}", self._worker_arguments(f"worker-{index}"))
            self._start(folder, "gateway", "gateway", [*self._peers(), "--port", str(self.options.port)])
            self._await_ready(deadline)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stops every service. An interrupt on the way (a second Ctrl-C) kills what is left at once."""
        order = sorted(self._processes.values(), key=_stop_position)
        deadline = time.monotonic() + self.options.stop_timeout_seconds
        try:
            for process in order:
                process.terminate()
            for process in order:
                process.wait_exited(max(0.0, deadline - time.monotonic()))
        finally:
            for process in order:
                if not process.exited.done():
                    process.kill()
            for process in order:
                process.exited.result()
            self._processes.clear()
            self.services.clear()
            self._lock.close()

    def _check_model(self) -> None:
        model = self.options.model
        if not model.is_dir():
            problem = "is a file" if model.exists() else "does not exist"
            raise FleetError(f"the model folder {model} {problem}: give the folder of a Hugging Face checkpoint")
        if not (model / "config.json").is_file():
            raise FleetError(f"the model folder {model} has no config.json: give a Hugging Face checkpoint")

    def _take_data_dir(self) -> None:
        """Two stores over one database would disagree. The kernel drops the lock when this process ends."""
        folder = self.options.data_dir
        try:
            (folder / "logs").mkdir(parents=True, exist_ok=True)
            lock = self._lock.enter_context((folder / "lock").open("w"))
        except OSError as error:
            problem = f"{error.strerror}; choose another one"
            raise FleetError(f"the data directory {folder} cannot be used: {problem}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise FleetError(f"another fleet is using {folder}; choose another data directory") from None

    def _start(self, folder: Path, module: str, name: str, arguments: Sequence[str]) -> None:
        extra = [*self.options.extra.get(module, ()), *self.options.extra.get(name, ())]
        command = [sys.executable, "-m", module, "--host", _HOST, "--port", "0", "--metrics-port", "0"]
        log = self.options.data_dir.resolve() / "logs" / f"{name}.log"
        # A later flag of the same name wins.
        self._processes[name] = ServiceProcess(name, [*command, *arguments, *extra], working_directory=folder, log=log)

    def _await_ready(self, deadline: float) -> None:
        """Until all that run are ready. One that ends before or after its ready line fails the start at once."""
        processes = self._processes.values()
        while waiting := [process for process in processes if not process.ready.done()]:
            events: list[Future[Any]] = [process.ready for process in waiting]
            events += [process.exited for process in processes]
            if not wait(events, max(0.0, deadline - time.monotonic()), FIRST_COMPLETED).done:
                name, log = waiting[0].name, waiting[0].log
                seconds = f"{self.options.ready_timeout_seconds:g} s"
                raise FleetError(f"{name} was not ready after {seconds}: {last_message(log)} (see {log})")
            self.wait(0)
        for process in processes:
            addresses = process.ready.result()
            self.services[process.name] = Service(
                name=process.name,
                pid=process.pid,
                address=addresses.get("grpc", ""),
                metrics_address=addresses.get("metrics", ""),
                log=process.log,
            )

    def _store_arguments(self) -> list[str]:
        folder = self.options.data_dir.resolve() / "store"
        return ["--data-dir", str(folder), *self._model()]

    def _worker_arguments(self, name: str) -> list[str]:
        options = self.options
        arguments = [*self._model(), "--worker-id", name, *self._peers()]
        arguments += ["--cache-dir", str(options.data_dir.resolve() / f"cache-{name}")]
        if "OMP_NUM_THREADS" not in os.environ:
            arguments += ["--threads", str(max(1, available_cores() // options.workers))]
        chosen = {"--device": options.device, "--dtype": options.dtype, "--memory": options.memory}
        for flag, value in chosen.items():
            arguments += [flag, value] if value else []
        return arguments

    def _model(self) -> list[str]:
        name = ["--model-name", self.options.model_name] if self.options.model_name else []
        return ["--model", str(self.options.model.resolve()), *name]

    def _peers(self) -> list[str]:
        return ["--scheduler", self.scheduler.address, "--adapter-store", self.adapter_store.address]


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_services() -> Path:
    """The checkout this package is installed from, or the current folder. Raises FleetError outside of both."""
    candidates = [Path(__file__).resolve().parent.parent, Path.cwd()]
    for candidate in candidates:
        if all((candidate / service / "__main__.py").is_file() for service in SERVICES):
            return candidate
    places = " nor in ".join(map(str, dict.fromkeys(candidates)))
    raise FleetError(
        f"the services are not in {places}: the package `loraplex` holds only the client and this command. "
        "Clone the loraplex repository and run `make install` there, or use its container image"
    )


def _stop_position(process: ServiceProcess) -> int:
    order = ("gateway", "worker", "scheduler", "adapter_store")
    return order.index(process.name.split("-")[0])
