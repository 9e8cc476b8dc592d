"""The rendered chart runs: every container as a process of this host, then the `helm test` pod's own command."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.chart.host import Host, unprivileged
from tests.chart.rendering import render
from tests.chart.value_sets import HA
from tests.checkout import ROOT

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """The release with Redis, so that every kind of container runs, on one worker."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        values = {**HA, "pools": [{"name": "default"}]}
        host = Host(render(values), folder)
        try:
            host.start()
            host.await_ready()
            yield host
        finally:
            host.stop()


def test_every_container_becomes_ready(host: Host) -> None:
    names = {"gateway", "scheduler", "scheduler-1", "adapter-store", "worker-default", "redis"}
    assert set(host.processes) == {f"demo-loraplex-{name}" for name in names}


def test_the_test_pod_uploads_and_generates(host: Host) -> None:
    result = host.run_test()
    assert result.returncode == 0, result.stdout
    assert "'smaerts'" in result.stdout


def test_the_gateway_counts_a_tenants_calls_in_redis(host: Host) -> None:
    """With the rights and the password that were rendered."""
    with redis.Redis(
        port=host.port("demo-loraplex-redis", 6379), username="loraplex", password=host.password()
    ) as client:
        left = float(client.hget("loraplex:quota:default", "1") or 0)
    assert 0 < left < 600


def test_the_test_pod_fails_on_another_answer(host: Host) -> None:
    result = host.run_test(expected="streams")
    assert result.returncode == 1
    assert "failed: the answer is 'smaerts'" in result.stdout


def test_the_user_can_write_neither_the_working_directory_nor_what_is_not_mounted() -> None:
    """Where the tests are not run as root there is no other user to become."""
    attempt = "import os; print(os.getuid(), os.access('.', os.W_OK), os.access('/etc', os.W_OK))"
    result = subprocess.run([*unprivileged(), sys.executable, "-c", attempt], cwd=ROOT, capture_output=True, text=True)
    user, here, _ = result.stdout.split()
    assert int(user) != 0
    assert here == ("False" if os.getuid() == 0 else "True")


def test_a_standby_takes_over_from_a_scheduler_that_was_killed(host: Host) -> None:
    """Also shows that the rendered rights in Redis are enough for the lease."""
    schedulers = [f"demo-loraplex-scheduler{suffix}" for suffix in ("", "-1")]
    (active,) = [name for name in schedulers if '"message": "active"' in host.log(name)]
    killed = host.processes.pop(active)
    killed.kill()
    killed.wait()
    host.await_line(next(name for name in schedulers if name != active), '"message": "active"')
    host.await_ready()
    result = host.run_test()
    assert result.returncode == 0, result.stdout


def test_told_to_stop_every_container_ends_well(host: Host) -> None:
    assert set(host.stop().values()) == {0}
