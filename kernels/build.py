"""Compiles the CPU kernels: `python -m kernels.build`, seconds, and nothing to do when the sources have not changed.

The library's name carries the hash of the sources and flags, so a library that is found is never stale.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent
LIBRARIES = HERE / "cpu"
# No contraction: what is fused is written in the sources, so that bits do not depend on the compiler.
FLAGS = ("-std=c++17", "-O3", "-march=x86-64-v3", "-ffp-contract=off", "-fopenmp", "-fPIC")
# GCC 12 takes a trick in its own AVX-512 header for a use of uninitialised values.
WARNINGS = ("-Wall", "-Wextra", "-Wno-uninitialized")


def sources() -> list[Path]:
    return sorted(HERE.glob("*/*.cpp"))


def library_path() -> Path:
    """Where the library of these sources is, or would be."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted([*sources(), *HERE.glob("*/*.h")]):
        digest.update(path.relative_to(HERE).as_posix().encode() + path.read_bytes())
    return LIBRARIES / f"libkernels-{digest.hexdigest()[:16]}.so"


def build(compiler: str) -> Path:
    """Compiles unless it is done. Raises CalledProcessError when the compiler does not like the sources."""
    path = library_path()
    if path.exists():
        return path
    # Moved when whole: another process may be loading, or compiling too.
    with TemporaryDirectory(dir=LIBRARIES, prefix=".build-") as folder:
        whole = Path(folder) / path.name
        objects = _compile(compiler, Path(folder))
        subprocess.run([compiler, *FLAGS, "-shared", "-o", str(whole), *objects], check=True)
        whole.replace(path)
    for old in LIBRARIES.glob("libkernels-*.so"):
        if old != path:
            old.unlink(missing_ok=True)
    return path


def _compile(compiler: str, folder: Path) -> list[str]:
    """One process per source, all at once."""
    running = {}
    for index, source in enumerate(sources()):
        out = str(folder / f"{index}.o")
        running[out] = subprocess.Popen([compiler, *FLAGS, *WARNINGS, "-c", "-o", out, str(source)])
    codes = [process.wait() for process in running.values()]
    if any(codes):
        raise subprocess.CalledProcessError(max(codes), compiler)
    return list(running)


def main() -> None:
    compiler = os.environ.get("CXX") or which("g++") or which("c++")
    if compiler is None:
        print("no C++ compiler: the kernels stay plain torch, which is several times slower", file=sys.stderr)
        return
    print(f"CPU kernels: {build(compiler).name}")


if __name__ == "__main__":
    main()
