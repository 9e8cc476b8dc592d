"""`make bench-fairness`: what a tenant that floods two workers costs a quiet one, on the real services.

The flood keeps 200 requests open, far more than two workers run at once. The quiet tenant sends one request after the
other. Its p90 of the time to the first token is measured five times in each of four ways: beside the flood under
`fair`; beside the same tenant limited at its source to a few open requests; and, as controls, beside the flood under
`fair` without preemption and under `fcfs`. The first two take turns on one fleet; a fleet is started for each set of
options. One JSON line a row, a summary last. `--only` names the fleets to measure.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import grpc

from benchmarks.fairness.gateway import Answer, TenantGateway
from benchmarks.hardware import ROOT, commit, hardware
from loraplex.fleet import Fleet, FleetOptions
from loraplex.requests import Upload
from loraplex.v1 import adapter_store_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc

NUM_RUNS = 5
RUN_SECONDS = 6.0
WARM_SECONDS = 1.5
FLOOD_OPEN = 200
LIMITED_OPEN = 4
QUIET_PAUSE_SECONDS = 0.1
MIN_REQUESTS = 3
TENANTS = ("flood", "quiet")
ADAPTERS = ROOT / "examples" / "demo_model" / "adapters"
WORKER = ["--threads", "1", "--max-sequences", "16"]


def tests_are_green() -> bool:
    """No number is reported of a scheduler that decides wrongly."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "tests/scheduler/test_policies.py",
        "tests/scheduler/test_shares.py",
    ]
    return subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode == 0


class Tenants:
    """The flood and the quiet tenant of one run."""

    def __init__(self, gateway: TenantGateway, adapters: list[dict[str, Any]], seed: int) -> None:
        self._gateway = gateway
        self._adapters = adapters
        self._random = random.Random(seed)
        # Of the flood.
        self._tokens = 0

    def _submit(self, tenant: str, prompt_tokens: int, max_tokens: int) -> Answer:
        prompt = [self._random.randrange(3, 200) for _ in range(prompt_tokens)]
        return self._gateway.submit(tenant, prompt, max_tokens, self._random.choice(self._adapters))

    async def run(self, num_open: int) -> tuple[list[float], int]:
        """First-token times of the quiet tenant in seconds, and tokens that the other got meanwhile."""
        flood = [asyncio.create_task(self._keep_sending()) for _ in range(num_open)]
        await asyncio.sleep(WARM_SECONDS)
        times: list[float] = []
        loop = asyncio.get_running_loop()
        end = loop.time() + RUN_SECONDS
        self._tokens = 0
        while loop.time() < end or len(times) < MIN_REQUESTS:
            answer = self._submit("quiet", 16, 4)
            await answer.ended.wait()
            if answer.error or answer.ttft_seconds is None:
                raise RuntimeError(f"a quiet request failed: {answer.error}")
            times.append(answer.ttft_seconds)
            await asyncio.sleep(QUIET_PAUSE_SECONDS)
        tokens = self._tokens
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
        return times, tokens

    async def _keep_sending(self) -> None:
        while True:
            answer = self._submit("flood", 32, 48)
            await answer.ended.wait()
            self._tokens += answer.num_tokens


def upload(store_address: str, folder: Path) -> dict[str, Any]:
    """The adapter for both tenants, straight into the store; what a request says of it."""
    with grpc.insecure_channel(store_address) as channel:
        stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
        for tenant in TENANTS:
            messages = list(Upload(folder.name, folder).messages())
            messages[0].header.tenant = tenant
            adapter = stub.UploadAdapter(iter(messages)).adapter
    return {
        "adapter_id": adapter.adapter_id,
        "adapter_version": adapter.adapter_version,
        "adapter_bytes": adapter.packed_bytes,
    }


async def measure(fleet: Fleet, kinds: dict[str, int]) -> list[dict[str, Any]]:
    """The kinds (name -> open requests of the flood) in turn, `NUM_RUNS` times each."""
    adapters = [upload(fleet.adapter_store.address, folder) for folder in sorted(ADAPTERS.iterdir())]
    rows = []
    for run in range(NUM_RUNS):
        for kind, num_open in kinds.items():
            gateway = TenantGateway(fleet.scheduler.address)
            await gateway.start(len(fleet.workers))
            times, tokens = await Tenants(gateway, adapters, run).run(num_open)
            await gateway.close()
            await _until_idle(fleet)
            p90 = statistics.quantiles(times, n=10, method="inclusive")[-1]
            rows.append({"kind": kind, "run": run, "requests": len(times), "ttft_p90_ms": round(1e3 * p90, 2)})
            rows[-1] |= {"ttft_p50_ms": round(1e3 * statistics.median(times), 2), "flood_tokens": tokens}
    return rows


async def _until_idle(fleet: Fleet) -> None:
    """What the last run left is gone: the gateway's requests are aborted when it stays away."""
    async with grpc.aio.insecure_channel(fleet.scheduler.address) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        while True:
            state = await stub.GetState(scheduler_pb2.GetStateRequest())
            busy = sum(worker.offered_requests + worker.running_requests for worker in state.workers)
            if not busy and not state.queued_requests:
                return
            await asyncio.sleep(0.1)


# Fleet -> options of its scheduler, and open requests of the flood by what the rows call that.
PLANS: dict[str, tuple[list[str], dict[str, int]]] = {
    "fair": ([], {"limited at its source": LIMITED_OPEN, "flood, fair": FLOOD_OPEN}),
    "no-preemption": (["--preempt-seconds", "1e9"], {"flood, fair without preemption": FLOOD_OPEN}),
    "fcfs": (["--policy", "fcfs"], {"flood, fcfs": FLOOD_OPEN}),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PLANS, default=list(PLANS))
    arguments = parser.parse_args()
    if not tests_are_green():
        print("the policies' tests are red: nothing is reported", file=sys.stderr)
        return 1
    about = {"bench": "fairness", "command": "make bench-fairness", "commit": commit(), **hardware()}
    rows: list[dict[str, Any]] = []
    for name in arguments.only:
        scheduler_options, kinds = PLANS[name]
        with tempfile.TemporaryDirectory() as folder:
            options = FleetOptions(
                model=ROOT / "examples" / "demo_model" / "base",
                data_dir=Path(folder),
                workers=2,
                memory="256MiB",
                extra={"scheduler": scheduler_options, "gpu_worker": WORKER},
            )
            with Fleet(options) as fleet:
                rows += asyncio.run(measure(fleet, kinds))
    for row in rows:
        print(json.dumps(about | row))
    summary: dict[str, Any] = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        p90s = [row["ttft_p90_ms"] for row in rows if row["kind"] == kind]
        summary[kind] = {"median_ms": statistics.median(p90s), "min_ms": min(p90s), "max_ms": max(p90s)}
    print(json.dumps(about | {"quiet_ttft_p90": summary}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
