"""A running fake gateway, and a folder that looks like an adapter."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.loraplex import fakes
from tests.loraplex.fakes import FakeGateway


@pytest.fixture
def running_gateway() -> Iterator[tuple[FakeGateway, str]]:
    with fakes.running() as (gateway, address):
        yield gateway, address


@pytest.fixture
def gateway(running_gateway: tuple[FakeGateway, str]) -> FakeGateway:
    return running_gateway[0]


@pytest.fixture
def address(running_gateway: tuple[FakeGateway, str]) -> str:
    return running_gateway[1]


@pytest.fixture
def adapter_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(b"{}")
    (folder / "adapter_model.safetensors").write_bytes(b"w" * 10)
    return folder
