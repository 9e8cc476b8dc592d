"""The store as a process: one ready line, small, without torch, and gone on SIGTERM."""

import asyncio
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import adapter_store
from adapter_store.servicer import AdapterStoreServicer
from common.channel import connect
from loraplex.v1 import adapter_store_pb2
from tests.adapter_store.crafted import make_files, make_tensors
from tests.adapter_store.fakes import StoreClient
from tests.adapter_store.tiny_base import write_base

ROOT = Path(adapter_store.__file__).parent.parent
MAX_RSS_KIB = 150 * 1024


@pytest.fixture
def process(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """A running store and the addresses of its ready line."""
    command = [sys.executable, "-m", "adapter_store", "--data-dir", str(tmp_path / "store")]
    command += ["--model", str(write_base(tmp_path)), "--drain-seconds", "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as store:
        try:
            assert store.stdout is not None
            kind, name, *addresses = store.stdout.readline().split()
            assert (kind, name) == ("ready", "adapter_store")
            yield store, dict(address.split("=", 1) for address in addresses)
        finally:
            store.kill()


async def upload_and_fetch(address: str) -> None:
    """Moves an adapter of some MiB through the store."""
    channel = connect(address)
    client, files = StoreClient(channel), make_files(tensors=make_tensors(lora_rank=8000), r=8000)
    version = (await client.upload("a", files)).adapter.adapter_version
    assert (await client.fetch(version)).data.size > 8 * 1024 * 1024
    await channel.close()


def test_a_store_process_is_small_and_has_no_torch(process: tuple[subprocess.Popen[str], dict[str, str]]) -> None:
    store, addresses = process
    asyncio.run(upload_and_fetch(addresses["grpc"]))
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{store.pid}/status").read_text())
    assert peak is not None
    assert int(peak[1]) < MAX_RSS_KIB
    assert not re.search(r"torch|transformers", Path(f"/proc/{store.pid}/maps").read_text())
    with urllib.request.urlopen(f"http://{addresses['metrics']}/metrics") as response:
        assert "loraplex_store_adapters 1.0" in response.read().decode()
    store.send_signal(signal.SIGTERM)
    assert store.wait(timeout=100) == 0


def test_a_store_without_its_model_says_so_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "adapter_store", "--data-dir", str(tmp_path), "--model", str(tmp_path / "none")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Hugging Face checkpoint folder" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_every_rpc_has_a_handler() -> None:
    methods = adapter_store_pb2.DESCRIPTOR.services_by_name["AdapterStoreService"].methods
    assert {method.name for method in methods} <= vars(AdapterStoreServicer).keys()
