"""`make bench-scrape`: how long `/metrics` of each service takes, and how large it is, when 5,000 adapters were served.

A label per adapter would make both grow with the adapters; labels are bounded, so they must not. Every adapter is
uploaded and asked once, so that whatever is kept for each of them is there. One JSON line last.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import numpy as np

from benchmarks.hardware import ROOT, commit, hardware
from loraplex import AsyncClient
from loraplex.fleet import Fleet, FleetOptions
from loraplex.metrics import fetch_metrics

BASE = ROOT / "examples" / "demo_model" / "base"
LIMIT_MS, LIMIT_BYTES = 50.0, 1_000_000
SCRAPES = 21
_UPLOADS, _REQUESTS = 16, 64


def write_adapter(folder: Path, number: int) -> Path:
    """A PEFT folder of rank 1 on one projection of one layer, its own by a few random weights."""
    folder.mkdir()
    sizes = json.loads((BASE / "config.json").read_text(encoding="utf-8"))
    hidden, random = sizes["hidden_size"], np.random.default_rng(number)
    out = sizes["num_attention_heads"] * sizes.get("head_dim", hidden // sizes["num_attention_heads"])
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"], "layers_to_transform": [0]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    name, header, data = "base_model.model.model.layers.0.self_attn.q_proj.lora", {}, b""
    for part, shape in (("A", (1, hidden)), ("B", (out, 1))):
        weights = (0.01 * random.standard_normal(shape)).astype("<f4").tobytes()
        offsets = [len(data), len(data) + len(weights)]
        header[f"{name}_{part}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        data += weights
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


async def at_once(limit: int, work: Callable[[int], Awaitable[object]], numbers: Iterable[int]) -> None:
    """Runs `work` for each number, at most `limit` together."""
    slots = asyncio.Semaphore(limit)

    async def one(number: int) -> None:
        async with slots:
            await work(number)

    await asyncio.gather(*(one(number) for number in numbers))


async def serve_all(gateway: str, folder: Path, adapters: int) -> None:
    """Uploads so many adapters and asks each of them for a token."""
    async with AsyncClient(gateway) as client:

        async def upload(number: int) -> None:
            await client.adapters.push(f"adapter-{number:05d}", write_adapter(folder / str(number), number))

        async def ask(number: int) -> None:
            await client.generate("x>", f"adapter-{number:05d}", max_tokens=1, timeout=600.0)

        await at_once(_UPLOADS, upload, range(adapters))
        await at_once(_REQUESTS, ask, range(adapters))


def scrape(address: str) -> dict[str, float]:
    """Median and worst milliseconds, bytes and series of one service."""
    seconds, text = [], ""
    for _ in range(SCRAPES):
        started = time.perf_counter()
        text = fetch_metrics(address)
        seconds.append(time.perf_counter() - started)
    series = sum(not line.startswith("#") for line in text.splitlines())
    return {
        "median_ms": round(1000 * statistics.median(seconds), 2),
        "worst_ms": round(1000 * max(seconds), 2),
        "bytes": len(text.encode()),
        "series": series,
    }


def tests_are_green() -> bool:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "tests/common/test_top_labels.py",
        "tests/gpu_worker/test_metrics.py",
    ]
    return subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=5000)
    adapters = parser.parse_args().adapters
    machine = hardware()
    if not tests_are_green():
        print("the tests of the metrics are red: nothing is reported", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "adapters").mkdir()
        options = FleetOptions(model=BASE, data_dir=folder / "fleet", memory="64MiB")
        with Fleet(options) as fleet:
            asyncio.run(serve_all(fleet.gateway.address, folder / "adapters", adapters))
            figures = {service.name: scrape(service.metrics_address) for service in fleet.services.values()}
    over = [name for name, row in figures.items() if row["median_ms"] > LIMIT_MS or row["bytes"] > LIMIT_BYTES]
    limits = {"median_ms": LIMIT_MS, "bytes": LIMIT_BYTES}
    line = {"bench": "scrape", "command": "make bench-scrape", "commit": commit(), **machine, "adapters": adapters}
    print(json.dumps(line | {"services": figures, "limits": limits, "over_limit": over}))
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
