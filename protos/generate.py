"""Generates the typed Python stubs of `protos/` into `loraplex/v1/`: `python protos/generate.py`."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def generate(out: Path = ROOT) -> None:
    """Writes `*_pb2.py`, `*_pb2_grpc.py` and their `.pyi` below `out`. Raises CalledProcessError when protoc fails."""
    sources = sorted(str(path.relative_to(ROOT / "protos")) for path in (ROOT / "protos" / "loraplex").rglob("*.proto"))
    # protoc finds its mypy plugins on PATH; an environment that is not activated does not have them there.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    outputs = [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}", *outputs, *sources]
    subprocess.run(command, check=True, env={**os.environ, "PATH": path})


if __name__ == "__main__":
    generate()
