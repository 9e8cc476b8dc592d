"""The fleet's processes: started in order, reported when they fail, never left behind."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import loraplex.fleet
from loraplex.fleet import Fleet, FleetOptions, find_services
from loraplex.process import FleetError, ServiceProcess, last_message, sigterm_as_interrupt
from tests.loraplex.fake_services import ends_within, is_running, logged, write_model, write_services

LAUNCHER = """
import signal, sys
from pathlib import Path
from loraplex.fleet import Fleet, FleetOptions
model, data_dir, services = map(Path, sys.argv[1:])
with Fleet(FleetOptions(model=model, data_dir=data_dir, services_folder=services)) as fleet:
    print(*(service.pid for service in fleet.services.values()), flush=True)
    signal.pause()
"""


@pytest.fixture
def options(tmp_path: Path) -> FleetOptions:
    return FleetOptions(
        model=write_model(tmp_path / "model"),
        data_dir=tmp_path / "data",
        services_folder=write_services(tmp_path / "services"),
    )


def pids(fleet: Fleet) -> list[int]:
    return [service.pid for service in fleet.services.values()]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Process ids of everything that was started, whether or not the fleet became ready."""
    found: list[int] = []

    def start(*arguments: Any, **options: Any) -> ServiceProcess:
        process = ServiceProcess(*arguments, **options)
        found.append(process.pid)
        return process

    monkeypatch.setattr(loraplex.fleet, "ServiceProcess", start)
    return found


def start_failure(options: FleetOptions) -> str:
    with pytest.raises(FleetError) as caught, Fleet(options):
        pass
    return str(caught.value)


def test_every_service_has_addresses_and_a_log(options: FleetOptions) -> None:
    with Fleet(replace(options, workers=2)) as fleet:
        assert list(fleet.services) == ["adapter_store", "scheduler", "worker-0", "worker-1", "gateway"]
        assert {service.address for service in fleet.services.values()} == {"127.0.0.1:1"}
        assert {service.metrics_address for service in fleet.services.values()} == {"127.0.0.1:2"}
        assert all(service.log.is_file() for service in fleet.services.values())


def test_a_worker_is_told_its_name_its_model_and_its_peers(options: FleetOptions) -> None:
    with Fleet(replace(options, memory="64MiB")) as fleet:
        arguments = logged(fleet.workers[0].log)[0]
    assert f"--model {options.model} --worker-id worker-0" in arguments
    assert "--scheduler 127.0.0.1:1 --adapter-store 127.0.0.1:1" in arguments
    assert "--memory 64MiB" in arguments


def test_store_and_worker_are_told_the_same_model(options: FleetOptions) -> None:
    with Fleet(replace(options, model_name="tiny")) as fleet:
        told = [logged(service.log)[0] for service in (fleet.adapter_store, fleet.workers[0])]
    assert all(f"--model {options.model} --model-name tiny" in arguments for arguments in told)


def test_the_gateway_gets_the_port(options: FleetOptions) -> None:
    with Fleet(replace(options, port=50051)) as fleet:
        assert logged(fleet.gateway.log)[0].endswith("--port 50051")


def test_extra_arguments_go_to_a_service_or_to_one_process(options: FleetOptions) -> None:
    extra = {"gpu_worker": ["--max-step-tokens", "16"], "worker-1": ["--step-log", "steps"]}
    with Fleet(replace(options, workers=2, extra=extra)) as fleet:
        first, second = (logged(worker.log)[0] for worker in fleet.workers)
    assert first.endswith("--max-step-tokens 16")
    assert second.endswith("--max-step-tokens 16 --step-log steps")


def test_leaving_stops_every_process(options: FleetOptions) -> None:
    with Fleet(options) as fleet:
        running = pids(fleet)
    assert not any(is_running(pid) for pid in running)


def test_an_exception_inside_stops_every_process(options: FleetOptions, started: list[int]) -> None:
    with pytest.raises(KeyboardInterrupt), Fleet(options):
        raise KeyboardInterrupt
    assert len(started) == 4
    assert not any(is_running(pid) for pid in started)


def test_a_service_that_ignores_sigterm_is_killed(options: FleetOptions) -> None:
    stubborn = replace(options, extra={"scheduler": ["--stubborn"]}, stop_timeout_seconds=0.1)
    with Fleet(stubborn) as fleet:
        running = pids(fleet)
    assert not any(is_running(pid) for pid in running)


def test_a_child_of_a_service_does_not_outlive_it(options: FleetOptions) -> None:
    with Fleet(replace(options, extra={"gpu_worker": ["--child"]})) as fleet:
        child = int(logged(fleet.workers[0].log)[1])
    assert ends_within(child, 60.0)


def test_nothing_survives_a_killed_launcher(options: FleetOptions) -> None:
    folders = [str(options.model), str(options.data_dir), str(options.services_folder)]
    with subprocess.Popen([sys.executable, "-c", LAUNCHER, *folders], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        running = [int(pid) for pid in launcher.stdout.readline().split()]
        launcher.kill()
    assert len(running) == 4
    assert all(ends_within(pid, 60.0) for pid in running)


@pytest.mark.parametrize("name", ["adapter_store", "scheduler", "gpu_worker", "gateway"])
def test_a_service_that_fails_is_named_with_its_last_error(options: FleetOptions, name: str) -> None:
    message = start_failure(replace(options, extra={name: ["--fail"]}))
    process = "worker-0" if name == "gpu_worker" else name
    assert message.startswith(f"{process} did not start: the disk is full (see ")


def test_a_start_that_fails_leaves_nothing_running(options: FleetOptions, started: list[int]) -> None:
    start_failure(replace(options, extra={"gateway": ["--fail"]}))
    assert len(started) == 4
    assert not any(is_running(pid) for pid in started)


def test_a_start_that_takes_too_long_leaves_nothing_running(options: FleetOptions, started: list[int]) -> None:
    start_failure(replace(options, extra={"adapter_store": ["--silent"]}, ready_timeout_seconds=0.1))
    assert len(started) == 2
    assert not any(is_running(pid) for pid in started)


def test_a_service_that_crashes_is_named_with_its_last_line(options: FleetOptions) -> None:
    assert "gateway did not start: RuntimeError: no such option" in start_failure(
        replace(options, extra={"gateway": ["--crash"]})
    )


def test_a_service_that_never_gets_ready_fails_the_start(options: FleetOptions) -> None:
    message = start_failure(replace(options, extra={"gateway": ["--silent"]}, ready_timeout_seconds=8.0))
    assert message.startswith("gateway was not ready after 8 s: ")


def test_a_service_that_ends_while_others_start_fails_the_start(options: FleetOptions) -> None:
    extra = {"adapter_store": ["--end"], "gateway": ["--silent"]}
    assert start_failure(replace(options, extra=extra)).startswith(
        "adapter_store ended with code 3: the engine is gone"
    )


def test_waiting_reports_a_service_that_ends(options: FleetOptions) -> None:
    with Fleet(options) as fleet:
        os.kill(fleet.scheduler.pid, signal.SIGKILL)
        with pytest.raises(FleetError, match="scheduler ended with code -9"):
            fleet.wait(60.0)


def test_waiting_ends_after_its_time(options: FleetOptions) -> None:
    with Fleet(options) as fleet:
        fleet.wait(0.01)


def test_a_second_fleet_on_the_same_data_is_refused(options: FleetOptions) -> None:
    with Fleet(options), pytest.raises(FleetError, match="another fleet is using"), Fleet(options):
        pass


def test_the_data_is_free_again_afterwards(options: FleetOptions) -> None:
    with Fleet(options):
        pass
    with Fleet(options) as fleet:
        assert len(fleet.services) == 4


@pytest.mark.parametrize(
    ("model_of", "problem"),
    [
        pytest.param(lambda folder: folder.parent, "has no config.json", id="no config"),
        pytest.param(lambda folder: folder / "nowhere", "does not exist", id="no folder"),
        pytest.param(lambda folder: folder / "config.json", "is a file", id="a file"),
    ],
)
def test_a_bad_model_folder_is_named(options: FleetOptions, model_of: Callable[[Path], Path], problem: str) -> None:
    model = model_of(options.model)
    assert start_failure(replace(options, model=model)).startswith(f"the model folder {model} {problem}: give ")


def test_a_data_directory_that_cannot_be_made_is_named(options: FleetOptions) -> None:
    folder = options.model / "config.json" / "data"
    message = f"the data directory {folder} cannot be used: Not a directory; choose another one"
    assert start_failure(replace(options, data_dir=folder)) == message


def test_a_service_that_cannot_be_started_is_named(options: FleetOptions) -> None:
    (options.data_dir / "logs" / "gateway.log").mkdir(parents=True)
    assert start_failure(options).startswith("gateway cannot be started: ")


def test_one_that_cannot_be_started_can_be_stopped_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told_to_stop = threading.Event()

    def spawn(*_: object) -> None:
        assert told_to_stop.wait(60)
        raise OSError("no more processes")

    monkeypatch.setattr(ServiceProcess, "_spawn", spawn)
    process = ServiceProcess("gateway", ["true"], working_directory=tmp_path, log=tmp_path / "log")
    stopping = threading.Thread(target=process.terminate, daemon=True)
    stopping.start()
    told_to_stop.set()
    stopping.join(60)
    assert not stopping.is_alive()
    with pytest.raises(FleetError, match="gateway cannot be started: no more processes"):
        process.ready.result()


def test_the_services_are_found_beside_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    services = write_services(tmp_path / "checkout")
    monkeypatch.setattr(loraplex.fleet, "__file__", str(services / "loraplex" / "fleet.py"))
    assert find_services() == services


def test_the_services_are_found_in_the_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loraplex.fleet, "__file__", str(tmp_path / "site-packages" / "loraplex" / "fleet.py"))
    monkeypatch.chdir(write_services(tmp_path / "image"))
    assert find_services() == tmp_path / "image"


def test_outside_of_both_it_says_how_to_get_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loraplex.fleet, "__file__", str(tmp_path / "site-packages" / "loraplex" / "fleet.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FleetError, match="Clone the loraplex repository"):
        find_services()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"level": "error", "message": "first"}\n{"level": "error", "message": "second"}\n', "second"),
        ('{"level": "error", "message": "bad"}\n{"level": "info", "message": "bye"}\n', "bad"),
        ('{"level": "info", "message": "hello"}\nplain text\n\n', "plain text"),
        ("[1]\n", "[1]"),
        ("", "it logged nothing"),
    ],
    ids=["last error", "error before info", "plain", "other JSON", "empty"],
)
def test_the_last_message_of_a_log(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "log").write_text(lines)
    assert last_message(tmp_path / "log") == message


def test_sigterm_interrupts_like_ctrl_c() -> None:
    with pytest.raises(KeyboardInterrupt), sigterm_as_interrupt():
        signal.raise_signal(signal.SIGTERM)
