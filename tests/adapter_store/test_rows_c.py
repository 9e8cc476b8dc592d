"""Security C 6 to 11 at the store.

C 2 and 3 are test_rows_c_ids.py, C 4 and the folder of C 6 belong to `loraplex adapters import`, C 5 is B 17, the
batch mates of C 10 are tests/gpu_worker/test_engine_poison.py, and that no code of ours can unpickle or evaluate what
it reads is tests/test_architecture.py.
"""

import importlib
import json
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapter_store.peft_config import parse_config
from adapter_store.weights import read_header
from common.errors import FailedPrecondition, InvalidArgument, LoraplexError
from tests.adapter_store.crafted import make_config, make_files, make_tensors, make_weights, tensor_name, with_header
from tests.adapter_store.fakes import StoreClient
from tests.checkout import ROOT


def pickled_call(canary: Path) -> bytes:
    """A pickle that makes a file when it is loaded."""
    return f"cbuiltins\nopen\n(S'{canary}'\nS'w'\ntR.".encode()


async def test_c06_pickled_weights_are_refused_unread(client: StoreClient, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    files = make_files() | {"adapter_model.safetensors": pickled_call(canary)}
    with pytest.raises(InvalidArgument):
        await client.upload("a", files)
    assert not canary.exists()


# PEFT itself writes auto_mapping and regular expressions of targets: they are read over, never used. "" means taken.
CODE_IN_CONFIG = [
    pytest.param({"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}}, "", id="auto_mapping"),
    pytest.param({"auto_map": {"AutoModel": "evil--x"}}, "AUTO_MAP_UNSUPPORTED", id="auto_map"),
    pytest.param({"target_modules": "(a+)+$"}, "", id="target-regex"),
    pytest.param({"exclude_modules": "(a+)+$"}, "", id="exclude-regex"),
    pytest.param({"layers_pattern": "(a+)+$"}, "", id="layers-regex"),
    pytest.param({"rank_pattern": {"(a+)+$": 4}}, "PATTERN_UNSUPPORTED", id="rank-regex"),
    pytest.param({"alpha_pattern": {"(a+)+$": 4}}, "PATTERN_UNSUPPORTED", id="alpha-regex"),
    pytest.param({"modules_to_save": ["lm_head"]}, "MODULES_TO_SAVE_UNSUPPORTED", id="modules_to_save"),
    pytest.param({"peft_type": "EVIL"}, "PEFT_TYPE_UNSUPPORTED", id="peft_type"),
    pytest.param({"eva_config": {"__class__": "evil.Evil"}}, "", id="eva_config"),
    pytest.param({"init_lora_weights": "evil"}, "INIT_LORA_WEIGHTS_UNSUPPORTED", id="init_lora_weights"),
    pytest.param({"evil_config": {"__class__": "evil.Evil"}}, "SETTING_UNKNOWN", id="unknown"),
]


@pytest.mark.parametrize(("changes", "reason"), CODE_IN_CONFIG)
def test_c07_a_config_is_judged_by_name_and_soon(changes: dict[str, Any], reason: str) -> None:
    data, started = json.dumps(make_config(**changes)).encode(), time.process_time()
    found = ""
    try:
        parse_config(data)
    except InvalidArgument as error:
        found = error.reason
    # It is judged in a tenth of a millisecond, and a collection of this process's garbage may come between.
    assert time.process_time() - started < 0.5
    assert found == reason


class Imports:
    """A finder that finds nothing and remembers what was looked for."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def find_spec(self, name: str, *_: object) -> None:
        self.names.append(name)


@pytest.mark.parametrize(("changes", "reason"), CODE_IN_CONFIG)
async def test_c07_an_upload_imports_nothing_and_compiles_no_pattern(
    client: StoreClient, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reason: str
) -> None:
    # Whatever an upload imports of its own is imported now.
    await client.upload("before", make_files(1))
    imports, patterns, files = Imports(), list[str](), make_files(**changes)
    # Where every compilation ends up.
    compiler: Any = importlib.import_module("re._compiler")
    compile_pattern = compiler.compile

    def compile_seen(pattern: Any, flags: int = 0) -> Any:
        patterns.append(str(pattern))
        return compile_pattern(pattern, flags)

    # What was compiled before is not compiled again.
    re.purge()
    monkeypatch.setattr(compiler, "compile", compile_seen)
    monkeypatch.setattr(sys, "meta_path", [imports, *sys.meta_path])
    # The watch itself sees what it is there for.
    re.compile("(b+)+$")
    with suppress(InvalidArgument) if reason else nullcontext():
        await client.upload("a", files)
    assert imports.names == []
    assert [pattern for pattern in patterns if "+)+$" in pattern] == ["(b+)+$"]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("evil")
    assert imports.names == ["evil"]


def entries(count: int) -> bytes:
    """Tensors that are right in everything but their number."""
    tensors = {f"t{i}": {"dtype": "F32", "shape": [1, 1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(count)}
    return with_header(json.dumps(tensors).encode(), bytes(4 * count))


def shaped(shape: list[int], offsets: list[int]) -> bytes:
    """A file of a few bytes whose one tensor claims another shape and place."""
    return make_weights(make_tensors(), {"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}})


ENTRY = '"a": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}'
NO_ROOM, SPAN, END = "the limit is 2097152", "its shape and dtype need", "the tensors end at byte"
# What makes the file, and a part of the answer: a bomb must not be refused for something else.
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "c08-length-2-63": (lambda: struct.pack("<Q", 2**63), NO_ROOM),
    "c08-header-99-mb": (lambda: with_header(b'{"__metadata__": {"a": "' + b"x" * 99_000_000 + b'"}}', b""), NO_ROOM),
    "c08-300000-tensors": (lambda: entries(300_000), NO_ROOM),
    "c08-small-tensors": (lambda: entries(20_000), "20000 tensors"),
    "c08-metadata-90-mb": (
        lambda: with_header(b'{"__metadata__": {' + b'"k":"v",' * 11_000_000 + b'"z":""}}', b""),
        NO_ROOM,
    ),
    "c08-metadata-2-mb": (
        lambda: with_header(b'{"__metadata__": {"k": [' + b"0," * 1_000_000 + b"0]}}", b""),
        "map names to strings",
    ),
    "c08-same-name-twice": (lambda: with_header(f"{{{ENTRY}, {ENTRY}}}".encode(), bytes(4)), "the key 'a' twice"),
    "c08-same-key-twice": (
        lambda: with_header(ENTRY.join("{}").replace('"shape"', '"dtype"').encode(), bytes(4)),
        "the key 'dtype' twice",
    ),
    "c08-deep": (lambda: with_header(b"{" + b'"a":{' * 200_000 + b"}" * 200_001, b""), "deeper than 3 levels"),
    "c08-nan": (lambda: with_header(ENTRY.join("{}").replace("[1, 1]", "[NaN, 1]").encode(), bytes(4)), "holds NaN"),
    "c08-long-integer": (
        lambda: with_header(ENTRY.join("{}").replace("[1, 1]", f"[{'9' * 5000}, 1]").encode(), bytes(4)),
        "an integer of more than 64 bits",
    ),
    "c09-shape-beyond-its-bytes": (lambda: shaped([2**62, 4], [0, 576]), SPAN),
    "c09-bytes-beyond-its-shape": (lambda: shaped([3, 48], [0, 2**62]), SPAN),
    "c09-shape-overflow": (lambda: shaped([2**33, 2**31], [0, 0]), SPAN),
    "c09-shape-below-0": (lambda: shaped([-3, -48], [0, 576]), "two sizes of at least 1"),
    "c09-declared-beyond-the-file": (lambda: shaped([10**6, 250], [0, 10**9]), END),
    "c09-declared-far-beyond-the-file": (lambda: shaped([2**31, 2**29], [0, 2**62]), END),
    "c09-place-beyond-the-file": (lambda: shaped([3, 48], [2**62, 2**62 + 576]), "leaves a gap"),
}


# Alone in a process, so that its peak of memory is the parser's own. (ru_maxrss would begin at the parent's.)
MEASURE = """
import sys, time
from adapter_store.weights import read_header
from common.errors import InvalidArgument
def peak():
    with open("/proc/self/status") as status:
        return int(status.read().split("VmHWM:")[1].split()[0]) / 1024
size = int(sys.argv[2])
with open(sys.argv[1], "rb") as file:
    before, started = peak(), time.process_time()
    try:
        read_header(file, size)
    except InvalidArgument as error:
        print(peak() - before, time.process_time() - started, error.message)
"""


@pytest.mark.parametrize("name", list(BOMBS))
def test_c08_c09_a_bomb_in_a_header_costs_little(tmp_path: Path, name: str) -> None:
    bomb, (make, problem) = tmp_path / "bomb", BOMBS[name]
    bomb.write_bytes(make())
    command = [sys.executable, "-c", MEASURE, str(bomb), str(bomb.stat().st_size)]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    mebibytes, seconds, message = output.split(maxsplit=2)
    assert problem in message
    assert float(mebibytes) < 50
    assert float(seconds) < 5


@pytest.mark.parametrize(
    ("rank", "reason"),
    [(10**9, "RANK_MISMATCH"), (2**63, "RANK_MISMATCH"), (0, "RANK_INVALID"), (-1, "RANK_INVALID")],
)
async def test_c09_a_rank_bomb_is_refused(client: StoreClient, rank: int, reason: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await client.upload("a", make_files(r=rank))
    assert caught.value.reason == reason


async def test_c09_a_size_bomb_is_refused(client: StoreClient) -> None:
    files = make_files() | {"adapter_model.safetensors": shaped([10**6, 250], [0, 10**9])}
    with pytest.raises(InvalidArgument, match="the tensors end at byte") as caught:
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
    assert time.process_time() - started < 2


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
