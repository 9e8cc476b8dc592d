"""Generates the gRPC stubs before a build, so that a wheel made from a fresh checkout holds them."""

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithStubs(build_py):
    """`build_py` that runs `protos/generate.py` first."""

    def run(self) -> None:
        generator = runpy.run_path(str(Path(__file__).resolve().parent / "protos" / "generate.py"))
        generator["generate"]()
        super().run()


setup(cmdclass={"build_py": BuildWithStubs})
