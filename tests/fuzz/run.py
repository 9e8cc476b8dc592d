"""One fuzzing process: `python -m tests.fuzz.run TARGET STATS CORPUS [libFuzzer options]`.

libFuzzer ends the process by itself, so the counts go to the file STATS now and then.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["adapter_store", "common"]):
    from tests.fuzz.targets import TARGETS, Counts

REPORT_EVERY = 500


def main() -> None:
    name, stats, *options = sys.argv[1:]
    target, counts = TARGETS[name], Counts()

    def test_one_input(data: bytes) -> None:
        target.run(data, counts)
        if counts.inputs % REPORT_EVERY == 0:
            Path(stats).write_text(json.dumps(asdict(counts)))

    def mutate(data: bytes, max_bytes: int, seed: int) -> bytes:
        return target.mutate(data, max_bytes, seed, atheris.Mutate)

    atheris.Setup([sys.argv[0], *options], test_one_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
