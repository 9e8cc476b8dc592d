"""`python -m tests.fuzz --seconds N`: every target for so long; one JSON line each; exit code 1 on a finding."""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.fuzz.campaign import run_campaign
from tests.fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=int, default=600, help="for each target [%(default)s]")
    seconds, found = parser.parse_args().seconds, 0
    for name in TARGETS:
        # Kept, so that what was found can be looked at.
        folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
        report = run_campaign(name, seconds, folder)
        line = {"target": name, "seconds": seconds, "coverage": round(report.coverage, 3), **asdict(report.counts)}
        print(json.dumps(line | {"parsed_share": round(report.parsed_share, 3), "found": bool(report.finding)}))
        if report.finding:
            found += 1
            print(f"the input is in {folder}\n{report.finding}")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
