"""Compiles every Triton kernel for sm_80 and sm_90 in the serving configurations: `make aot-table`, no GPU needed.

Prints one JSON line a row and rewrites the table in docs/performance.md.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu.launches import layer_launches
from benchmarks.gpu.shapes import ARCHITECTURES, MODELS, STEPS
from kernels.gpu import tiles
from kernels.gpu.aot import Resources, compile_launch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
BEGIN, END = "<!-- triton: begin -->", "<!-- triton: end -->"


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel of one configuration on one architecture."""

    architecture: str
    model: str
    step: str
    kernel: str
    num_warps: int
    num_stages: int
    resources: Resources

    @property
    def name(self) -> tuple[str, ...]:
        """Of its line in the table."""
        return self.model, self.step, self.kernel


def rows(architectures: tuple[str, ...] = ARCHITECTURES) -> Iterator[Row]:
    for architecture in architectures:
        for model, shape in MODELS.items():
            for step, step_shape in STEPS.items():
                with tiles.architecture(architecture):
                    work = list(layer_launches(shape, step_shape))
                for launch in work:
                    name = launch.kernel.__name__.removesuffix("_kernel")
                    resources = compile_launch(launch, architecture)
                    yield Row(architecture, model, step, name, launch.num_warps, launch.num_stages, resources)


def table(found: list[Row]) -> str:
    """One line a kernel of a configuration; a cell has registers, shared bytes and spilled bytes. Where architectures
    differ in warps or stages, these stand in the architectures' order."""
    lines = [
        "| model | step | kernel | warps | stages | " + " | ".join(ARCHITECTURES) + " |",
        "|---|---|---|---|---|" + "---|" * len(ARCHITECTURES),
    ]
    by_name: dict[tuple[str, ...], list[Row]] = {}
    for row in found:
        by_name.setdefault(row.name, []).append(row)
    for name, same in by_name.items():
        used = [f"{r.registers}, {r.shared_bytes}, {r.spill_bytes}" for r in (row.resources for row in same)]
        warps, stages = (
            sizes[0] if len(set(sizes)) == 1 else ", ".join(sizes)
            for sizes in zip(*((str(row.num_warps), str(row.num_stages)) for row in same), strict=True)
        )
        lines.append("| " + " | ".join([*name, warps, stages, *used]) + " |")
    return "\n".join(lines)


def main() -> None:
    import triton

    found = []
    for row in rows():
        print(json.dumps({**asdict(row), "triton": triton.__version__}), flush=True)
        found.append(row)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    about = f"Compiled by triton {triton.__version__}; tiles: {tiles.table().hardware}."
    PAGE.write_text(f"{before}{BEGIN}\n\n{about}\n\n{table(found)}\n\n{END}{after}")


if __name__ == "__main__":
    main()
