"""`loraplex up` on real checkpoints: serves what is good, and says in one line what is wrong."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from loraplex import Client
from tests.e2e.tiny_model import TinyModel

TIMEOUT_SECONDS = 200


def command(model: Path, data_dir: Path, *arguments: str) -> list[str]:
    base = [sys.executable, "-m", "loraplex", "up", "--model", str(model), "--data-dir", str(data_dir)]
    return [*base, "--memory", "8MiB", *(arguments or ("--port", "0"))]


def left_running(data_dir: Path) -> list[str]:
    """Command lines of processes that were started for this data folder."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(data_dir) in line:
                found.append(line)
    return found


def assert_refused(model: Path, data_dir: Path, says: str, *arguments: str) -> None:
    done = subprocess.run(
        command(model, data_dir, *arguments), capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )
    assert done.returncode == 1
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("loraplex: "))
    assert says in error
    assert "Traceback" not in done.stderr
    assert left_running(data_dir) == []


def copy_base(tiny: TinyModel, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.base, tmp_path / "base"))


def lose_a_shard(base: Path) -> str:
    LlamaForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="200KB")
    (base / "model.safetensors").unlink(missing_ok=True)
    shard = sorted(base.glob("model-*.safetensors"))[1]
    shard.unlink()
    return shard.name


def store_integers(base: Path) -> str:
    weights = load_file(base / "model.safetensors")
    name = "model.norm.weight"
    save_file({**weights, name: weights[name].to(torch.int8)}, base / "model.safetensors")
    return name


def spoil_the_tokenizer(base: Path) -> str:
    (base / "tokenizer.json").write_text("{}")
    return "tokenizer.json cannot be read"


def drop_the_tokenizer(base: Path) -> str:
    (base / "tokenizer.json").unlink()
    return "tokenizer.json"


def change_the_family(base: Path) -> str:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "gemma2"}))
    return "gemma2"


@pytest.mark.parametrize(
    "spoil",
    [lose_a_shard, store_integers, drop_the_tokenizer, spoil_the_tokenizer, change_the_family],
    ids=["missing-shard", "wrong-dtype", "no-tokenizer", "bad-tokenizer", "unknown-family"],
)
def test_a_spoiled_checkpoint_is_one_clear_error(tiny: TinyModel, tmp_path: Path, spoil: Callable[[Path], str]) -> None:
    base = copy_base(tiny, tmp_path)
    assert_refused(base, tmp_path / "data", spoil(base))


def test_a_taken_port_is_one_clear_error(tiny: TinyModel, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert_refused(tiny.base, tmp_path / "data", f"127.0.0.1:{port}", "--port", port)


def test_a_folder_of_unreadable_adapters_is_one_clear_error(tiny: TinyModel, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny.adapters["rank-1"], tmp_path / "adapters" / "broken"))
    (broken / "adapter_model.safetensors").write_bytes(b"not safetensors")
    adapters = ["--port", "0", "--adapters", str(tmp_path / "adapters")]
    assert_refused(tiny.base, tmp_path / "data", "none of the 1 adapters was loaded", *adapters)


def test_one_bad_adapter_does_not_stop_the_others(tiny: TinyModel, tmp_path: Path) -> None:
    adapters = tmp_path / "adapters"
    for name in ("rank-1", "rank-3"):
        shutil.copytree(tiny.adapters[name], adapters / name)
    (adapters / "rank-1" / "adapter_model.safetensors").write_bytes(b"not safetensors")
    arguments = command(tiny.base, tmp_path / "data", "--port", "0", "--adapters", str(adapters))
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as up:
        assert up.stdout is not None
        lines = []
        for line in up.stdout:
            lines.append(line)
            if line.startswith("ready gateway="):
                break
        states = {line.split()[0]: line.split()[1] for line in lines if line.startswith("rank-")}
        assert states == {"rank-1": "refused", "rank-3": "loaded"}
        with Client(lines[-1].strip().removeprefix("ready gateway=")) as client:
            assert client.generate("hello", "rank-3", max_tokens=2).adapter_version
        up.send_signal(signal.SIGTERM)
        assert up.wait(TIMEOUT_SECONDS) == 0
    assert left_running(tmp_path / "data") == []
