"""A real Prometheus that scrapes a fleet twice a second."""

import json
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.adapter_store.redis_server import free_port
from tests.checkout import ROOT

DEADLINE_SECONDS = 200.0
RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
# Grafana puts at least four scrapes here.
RATE_INTERVAL = "20s"


# Labels, and (Unix time, value) pairs.
Series = tuple[dict[str, str], list[tuple[float, float]]]


@dataclass(frozen=True)
class Prometheus:
    """Asked over HTTP, as Grafana asks it."""

    address: str

    def ask(self, path: str, **arguments: str) -> Any:
        """The `data` of an answer. Raises HTTPError when the expression is refused."""
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
        with urllib.request.urlopen(url, timeout=60) as response:
            return json.load(response)["data"]

    def instant(self, expression: str) -> list[float]:
        """The values of every series the expression gives now."""
        expression = expression.replace("$__rate_interval", RATE_INTERVAL)
        return [float(series["value"][1]) for series in self.ask("query", query=expression)["result"]]

    def range(
        self, expression: str, start: float, end: float
    ) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
        """Every series between two times, once a second."""
        expression = expression.replace("$__rate_interval", RATE_INTERVAL)
        found = self.ask("query_range", query=expression, start=str(start), end=str(end), step="1")["result"]
        return [(series["metric"], [(float(at), float(value)) for at, value in series["values"]]) for series in found]

    def until(self, expression: str) -> None:
        """Returns once the expression gives a series."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not self.instant(expression):
            assert time.monotonic() < deadline, f"no data for {expression}"
            time.sleep(0.1)

    def until_scraped(self, num_targets: int) -> None:
        """Returns once every target was scraped after this moment."""
        self.until(f"count(up) == {num_targets} and min(up) == 1 and min(timestamp(up)) > {time.time()}")


@contextmanager
def scraping(folder: Path, targets: Mapping[str, list[str]]) -> Iterator[Prometheus]:
    """Runs until the block ends; `targets` maps a job to metrics addresses. Rules are evaluated once a second."""
    rules = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    for group in rules["groups"]:
        group["interval"] = "1s"
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    jobs = [{"job_name": job, "static_configs": [{"targets": addresses}]} for job, addresses in targets.items()]
    configuration = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "1s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": jobs,
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration), encoding="utf-8")
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        prometheus = Prometheus(address)
        _await_ready(process, address, folder / "log")
        yield prometheus
    finally:
        process.terminate()
        process.wait()


def _await_ready(process: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"http://{address}/-/ready", timeout=5):
                return
        except OSError:
            assert process.poll() is None, log.read_text(encoding="utf-8")
            assert time.monotonic() < deadline, "Prometheus is not ready"
            time.sleep(0.1)
