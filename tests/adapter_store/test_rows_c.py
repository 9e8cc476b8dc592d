"""Security C 2 to 11 at the store.

C 4 and the folder of C 6 belong to `loraplex adapters import`, C 5 is B 17, and that no code of ours can unpickle or
evaluate what it reads is tests/test_architecture.py.
"""

import json
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapter_store.peft_config import parse_config
from adapter_store.weights import read_header
from common.errors import FailedPrecondition, InvalidArgument, LoraplexError, NotFound
from tests.adapter_store.crafted import make_config, make_files, make_tensors, make_weights, tensor_name, with_header
from tests.adapter_store.fakes import StoreClient
from tests.checkout import ROOT

SAMPLES = 1000

_opened: list[str] = []


def _watch_opens(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str):
        _opened.append(arguments[0])


@pytest.fixture
def opened() -> list[str]:
    """Every path that this process opens."""
    if not hasattr(sys, "_loraplex_hook"):
        sys.addaudithook(_watch_opens)
        sys._loraplex_hook = True  # type: ignore[attr-defined]  # a hook cannot be taken away again
    _opened.clear()
    return _opened


async def message_of(call: Any) -> str:
    with pytest.raises(NotFound) as caught:
        await call
    return f"{caught.value.reason} {caught.value.message} {caught.value.metadata}"


async def test_c02_another_tenants_adapter_looks_like_none(client: StoreClient) -> None:
    version = (await client.upload("a", make_files())).adapter.adapter_version
    await client.upload("b", make_files(1), tenant="other")
    for foreign, unknown in (
        (client.get("a", tenant="other"), client.get("a", tenant="nobody")),
        (client.delete("a", tenant="other"), client.delete("a", tenant="nobody")),
        (client.fetch(version, tenant="other"), client.fetch(version, tenant="nobody")),
    ):
        assert await message_of(foreign) == await message_of(unknown)


async def test_c02_the_answer_takes_no_longer_for_what_exists(client: StoreClient) -> None:
    await client.upload("a", make_files())
    seconds: dict[str, list[float]] = {"a": [], "z": []}
    for sample in range(SAMPLES):
        for adapter_id in ("az", "za")[sample % 2]:
            started = time.perf_counter()
            with pytest.raises(NotFound):
                await client.get(adapter_id, tenant="other")
            seconds[adapter_id].append(time.perf_counter() - started)
    exists, not_there = (statistics.median(times) for times in seconds.values())
    # Ten times the bound of the row: the medians have an error of their own on a busy machine.
    assert abs(exists - not_there) < not_there


BAD_IDS = [
    "../x",
    "..%2f",
    "/etc/passwd",
    "a\0b",
    "a/../../b",
    "\\\\host\\share",
    "a\N{FRACTION SLASH}b",
    "a" * 4096,
    ".",
    "..",
    "a/",
    "A",
]


@pytest.mark.parametrize("bad", BAD_IDS, ids=lambda bad: repr(bad[:20]))
async def test_c03_an_id_is_never_a_path(client: StoreClient, opened: list[str], bad: str) -> None:
    for call in (
        client.upload(bad, make_files()),
        client.get(bad),
        client.delete(bad),
        client.set_alias(bad, "0" * 64),
        client.page(token=bad),
        client.fetch(bad),
        client.get("a", bad),
        client.set_alias("a", bad),
    ):
        with pytest.raises(InvalidArgument):
            await call
    assert opened == []


async def test_c03_an_id_that_ends_with_a_dot_opens_nothing_of_that_name(
    client: StoreClient, opened: list[str], data_dir: Path
) -> None:
    await client.upload("a.", make_files())
    assert opened
    assert [path for path in opened if "a." in Path(path).parts] == []
    assert [path for path in opened if not path.startswith(str(data_dir))] == []


def pickled_call(canary: Path) -> bytes:
    """A pickle that makes a file when it is loaded."""
    return f"cbuiltins\nopen\n(S'{canary}'\nS'w'\ntR.".encode()


async def test_c06_pickled_weights_are_refused_unread(client: StoreClient, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    files = make_files() | {"adapter_model.safetensors": pickled_call(canary)}
    with pytest.raises(InvalidArgument):
        await client.upload("a", files)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        pytest.param({"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}}, True, id="auto_mapping"),
        pytest.param({"auto_map": {"AutoModel": "evil--x"}}, False, id="auto_map"),
        pytest.param({"target_modules": "(a+)+$"}, True, id="target-regex"),
        pytest.param({"layers_pattern": "(a+)+$"}, True, id="layers-regex"),
        pytest.param({"rank_pattern": {"(a+)+$": 4}}, False, id="rank-regex"),
        pytest.param({"modules_to_save": ["lm_head"]}, False, id="modules_to_save"),
        pytest.param({"peft_type": "EVIL"}, False, id="peft_type"),
        pytest.param({"eva_config": {"__class__": "evil.Evil"}}, True, id="eva_config"),
    ],
)
def test_c07_a_config_runs_and_imports_nothing(changes: dict[str, Any], taken: bool) -> None:
    data = json.dumps(make_config(**changes)).encode()
    before, started = set(sys.modules), time.process_time()
    try:
        parse_config(data)
        accepted = True
    except InvalidArgument:
        accepted = False
    assert time.process_time() - started < 0.05
    assert set(sys.modules) == before
    assert accepted == taken


def entries(count: int) -> bytes:
    tensors = {f"t{i}": {"dtype": "F32", "shape": [0, 1], "data_offsets": [0, 0]} for i in range(count)}
    return json.dumps(tensors).encode()


ENTRY = '"a": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}'
BOMBS: dict[str, Callable[[], bytes]] = {
    "length-2-63": lambda: struct.pack("<Q", 2**63),
    "header-99-mb": lambda: with_header(b'{"__metadata__": {"a": "' + b"x" * 99_000_000 + b'"}}', b""),
    "300000-tensors": lambda: with_header(entries(300_000), b""),
    "small-tensors": lambda: with_header(entries(20_000), b""),
    "metadata-90-mb": lambda: with_header(b'{"__metadata__": {' + b'"k":"v",' * 11_000_000 + b'"z":""}}', b""),
    "same-name-twice": lambda: with_header(f"{{{ENTRY}, {ENTRY}}}".encode(), bytes(4)),
    "deep": lambda: with_header(b"{" + b'"a":{' * 200_000 + b"}" * 200_001, b""),
    "nan": lambda: with_header(b'{"a": {"dtype": "F32", "shape": [NaN, 1], "data_offsets": [0, 4]}}', bytes(4)),
    "long-integer": lambda: with_header(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b", 1]}}", b""),
}


# Alone in a process, so that its peak of memory is the parser's own.
MEASURE = """
import io, resource, sys, time
from adapter_store.weights import read_header
from common.errors import InvalidArgument
size = int(sys.argv[2])
with open(sys.argv[1], "rb") as file:
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        read_header(file, size)
    except InvalidArgument:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print((peak - before) / 1024, time.process_time() - started)
"""


@pytest.mark.parametrize("name", list(BOMBS))
def test_c08_a_header_bomb_costs_little(tmp_path: Path, name: str) -> None:
    bomb = tmp_path / "bomb"
    bomb.write_bytes(BOMBS[name]())
    command = [sys.executable, "-c", MEASURE, str(bomb), str(bomb.stat().st_size)]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    mebibytes, seconds = map(float, output.split())
    assert mebibytes < 50
    assert seconds < 1


@pytest.mark.parametrize("rank", [10**9, 0, -1, 2**63])
async def test_c09_a_rank_bomb_is_refused(client: StoreClient, rank: int) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await client.upload("a", make_files(r=rank))
    assert caught.value.reason in ("RANK_INVALID", "RANK_MISMATCH")


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [([2**62, 4], [0, 576]), ([3, 48], [0, 2**62]), ([2**31, 2**31], [0, 2**64]), ([3, 48], [0, 10**9])],
)
async def test_c09_a_size_bomb_is_refused(client: StoreClient, shape: list[int], offsets: list[int]) -> None:
    header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}
    files = make_files() | {"adapter_model.safetensors": make_weights(make_tensors(), header)}
    with pytest.raises(InvalidArgument) as caught:
        await client.upload("a", files)
    assert caught.value.reason == "WEIGHTS_INVALID"


async def test_c09_trailing_bytes_are_refused(client: StoreClient) -> None:
    files = make_files()
    files["adapter_model.safetensors"] += b"x"
    with pytest.raises(InvalidArgument, match="the tensors end at byte"):
        await client.upload("a", files)


def test_c09_a_sparse_file_of_8_gib_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(make_weights(make_tensors()))
        file.truncate(8 * 1024**3)
    started = time.process_time()
    with path.open("rb") as file, pytest.raises(InvalidArgument, match="the tensors end at byte"):
        read_header(file, path.stat().st_size)
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
async def test_c10_weights_that_are_no_numbers_are_refused(client: StoreClient, value: float) -> None:
    tensors = make_tensors()
    tensors[tensor_name(1, "down_proj", "B")][3, 1] = value
    with pytest.raises(InvalidArgument) as caught:
        await client.upload("a", make_files(tensors=tensors))
    assert caught.value.reason == "WEIGHTS_NOT_FINITE"


@pytest.mark.parametrize("alpha", [1e308, -1e308])
async def test_c10_an_alpha_that_overflows_is_refused(client: StoreClient, alpha: float) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await client.upload("a", make_files(lora_alpha=alpha))
    assert caught.value.reason == "ALPHA_INVALID"


async def test_c11_other_shapes_are_a_failed_precondition(client: StoreClient) -> None:
    tensors = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in make_tensors().items()}
    with pytest.raises(FailedPrecondition) as caught:
        await client.upload("a", make_files(tensors=tensors))
    assert caught.value.reason == "BASE_MODEL_MISMATCH"


async def test_c11_another_recorded_name_is_a_warning(client: StoreClient) -> None:
    response = await client.upload("a", make_files(base_model_name_or_path="org/other"))
    assert "was made for 'org/other'" in response.warnings[0]


async def test_refusals_show_nothing_of_the_machine(client: StoreClient, data_dir: Path) -> None:
    for files in (make_files(r=9), make_files(use_dora=True), {}):
        with pytest.raises(LoraplexError) as caught:
            await client.upload("a", files)
        assert str(data_dir) not in caught.value.message
        assert "0x" not in caught.value.message
