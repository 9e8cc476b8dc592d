"""`python -m benchmarks.gpu test|bench|tune`: from the tree, without stubs, one JSON line a row.

`--device cpu` runs the same code at tiny shapes in Triton's interpreter: it exercises this program and proves the
kernels there, and its times mean nothing.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path


def _rows(command: str, device_name: str, table: Path | None) -> Iterator[dict[str, object]]:
    # After the environment is set: triton decides at import whether it interprets.
    import torch

    from benchmarks.gpu import graphs, invariance, machine, operations, parity, serving, shapes, steps, tune
    from kernels.gpu import tiles

    device = machine.open_device(device_name)
    is_tiny = device.type == "cpu"
    models = {"tiny": shapes.TINY} if is_tiny else shapes.MODELS
    step_shapes = shapes.TINY_STEPS if is_tiny else shapes.STEPS
    generator = torch.Generator(device).manual_seed(0)
    if command == "test":
        yield from parity.rows(models, step_shapes, device)
        yield from invariance.rows(next(iter(models.values())), device)
        yield from graphs.rows(device)
        yield graphs.waits_row(device)
        return
    if command == "tune":
        hardware = str(machine.about(device)["device"])
        model = next(iter(models.values()))
        yield from tune.rows(model, step_shapes, generator, hardware, table or tiles.TABLE, 1 if is_tiny else None)
        return
    name, model = next(iter(models.items()))
    failed = [row for row in parity.rows({name: model}, step_shapes, device) if not row["passed"]]
    if failed:
        sys.exit(f"the kernels are wrong here, no number is worth reporting: {json.dumps(failed)}")
    floors = machine.measure_floors(device)
    yield {
        "op": "read, copy and product",
        "read_gigabytes_per_second": round(floors.read_bytes_per_second / 1e9, 1),
        "copy_gigabytes_per_second": round(floors.copy_bytes_per_second / 1e9, 1),
        "teraflops": round(floors.flops_per_second / 1e12, 2),
    }
    yield from operations.rows({name: model}, step_shapes, floors, generator)
    decoder = steps.random_decoder(model, torch.bfloat16, device, 64 if is_tiny else shapes.MAX_CONTEXT)
    yield from steps.rows(name, model, decoder, floors, generator)
    yield from serving.rows(name, model, decoder, serving.TINY if is_tiny else serving.FULL)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("command", choices=("test", "bench", "tune"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--table", type=Path, help="where `tune` writes, instead of kernels/gpu/tiles.json")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        if options.command == "tune" and options.table is None:
            parser.error("an interpreter's tiles are not for the checked-in table: name another with --table")
    about: dict[str, object] = {}
    passed = True
    for row in _rows(options.command, options.device, options.table):
        if not about:
            import torch

            from benchmarks.gpu import machine

            about = machine.about(torch.device(options.device))
        passed = passed and bool(row.get("passed", True))
        print(json.dumps(row | about), flush=True)
    if not passed:
        sys.exit("a kernel differs from float64 by more than its bound, or a control passed")


if __name__ == "__main__":
    main()
