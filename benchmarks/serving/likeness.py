"""Whether PEFT does here what it is known to do: a peer that runs badly makes us look good."""

from collections.abc import Sequence
from typing import Any

# Batches of 32, mixed adapters, torch 2.13, transformers 5.23, peft 0.21; two cores of an AMD EPYC Milan at real-time
# priority.
KNOWN_CPU = "EPYC"
KNOWN = {("S", "n1"): 599, ("S", "n8"): 373, ("S", "n64"): 243, ("M", "n8"): 53.2, ("M", "n64"): 45.0}
TOLERANCE = 0.25


def likeness(rows: Sequence[dict[str, Any]], cpu: str, cores: int) -> str:
    """A sentence about PEFT's figures of this run beside the known ones; empty when PEFT did not run."""
    figures = [
        (f"{row['model']} {row['workload']}", row["tokens_per_second"], KNOWN[row["model"], row["workload"]])
        for row in rows
        if row["name"] == "peft" and (row["model"], row["workload"]) in KNOWN
    ]
    if not figures:
        return ""
    compared = ", ".join(f"{name} {here:.0f} for {known:g}" for name, here, known in figures)
    if KNOWN_CPU not in cpu or cores != 2:
        return f"PEFT's known figures are of two cores of another processor (AMD EPYC Milan, AVX2): {compared}."
    off = [name for name, here, known in figures if not 1 - TOLERANCE <= here / known <= 1 + TOLERANCE]
    if not off:
        return f"PEFT is within {TOLERANCE:.0%} of its known figures on such a machine: {compared}."
    where = ", ".join(off)
    return f"PEFT is more than {TOLERANCE:.0%} off its known figures on {where}: {compared}. Trust no ratio to it."
