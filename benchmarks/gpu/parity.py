"""Every Triton kernel against float64 on the device it runs on. Bounds are those of the tests in tests/kernels.

One row an operation, shape and dtype; `share` is the largest error over its bound, and above 1 is a failure. A
negative control beside each: the same comparison with one input changed must fail.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.inputs import make_paged, make_segments, make_tables, ranks_of
from benchmarks.gpu.shapes import QKV, ModelShape, StepShape
from kernels import dispatch
from kernels.adapters import ADAPTER_DTYPES, AdapterTables, Segments
from kernels.linear import linear
from kernels.lora_expand import lora_expand
from kernels.lora_shrink import lora_shrink
from kernels.paged_attention import paged_attention
from kernels.paged_rows import read_rows, row_units, segment_modules
from kernels.rms_norm import rms_norm
from kernels.silu_and_mul import silu_and_mul
from kernels.store_kv import store_kv

EPS = torch.finfo(torch.float32).eps
NORM_EPS = 1e-5
LAYER = 1
# What came out, what should have, how far off it may be.
Outcome = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Scene:
    """What an operation is tested with; `spoiled` = one input of what comes out is not that of what should."""

    model: ModelShape
    step: StepShape
    dtype: torch.dtype
    generator: torch.Generator
    spoiled: bool = False

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.generator.device).to(self.dtype)

    def changed(self, tensor: Tensor) -> Tensor:
        return tensor * 1.25 if self.spoiled else tensor

    @property
    def eps(self) -> float:
        return torch.finfo(self.dtype).eps


def _lora(scene: Scene) -> tuple[AdapterTables, Segments]:
    tables = make_tables(
        scene.model, ranks_of(scene.step), scene.dtype, scene.generator, ("q_proj", "k_proj", "v_proj")
    )
    base = scene.step.tokens // 4
    return tables, make_segments(scene.step.tokens, scene.step.adapters, scene.generator.device, base)


def _shrink(scene: Scene) -> Outcome:
    tables, segments = _lora(scene)
    x = scene.draw(scene.step.tokens, scene.model.hidden)
    out = lora_shrink(scene.changed(x), tables, segments, LAYER, QKV)
    values = torch.zeros_like(out, dtype=torch.float64)
    bounds = torch.zeros_like(values)
    for run in segment_modules(tables, segments, LAYER, QKV):
        rows = x[run.start : run.end].double()
        for index, rank in enumerate(run.lora_rank):
            a = read_rows(tables, run.adapter, run.start_unit[index], rank, scene.model.hidden, run.dtype).double()
            place = index, slice(run.start, run.end), slice(rank)
            values[place] = rows @ a.T
            bounds[place] = scene.model.hidden * EPS * (rows.abs() @ a.abs().T)
    return out, values, bounds


def _expand(scene: Scene) -> Outcome:
    tables, segments = _lora(scene)
    shape = len(QKV), scene.step.tokens, tables.max_lora_rank
    shrunk = torch.randn(shape, generator=scene.generator, device=scene.generator.device)
    out = scene.draw(scene.step.tokens, sum(scene.model.qkv))
    values, bounds = out.double(), torch.zeros(out.shape, dtype=torch.float64, device=out.device)
    columns, limits = (both.split_with_sizes(scene.model.qkv, dim=1) for both in (values, bounds))
    for run in segment_modules(tables, segments, LAYER, QKV):
        tokens, a_units = slice(run.start, run.end), row_units(scene.model.hidden, run.dtype)
        for index, (rank, features) in enumerate(zip(run.lora_rank, scene.model.qkv, strict=True)):
            unit = run.start_unit[index] + rank * a_units
            b = read_rows(tables, run.adapter, unit, rank, features, run.dtype).double()
            narrow = shrunk[index, tokens, :rank].double()
            magnitude = columns[index][tokens].abs() + run.scaling[index] * (narrow.abs() @ b.abs())
            columns[index][tokens] += run.scaling[index] * (narrow @ b)
            limits[index][tokens] = (rank + 3) * EPS * magnitude + scene.eps * columns[index][tokens].abs()
    lora_expand(scene.changed(shrunk), tables, segments, LAYER, QKV, scene.model.hidden, scene.model.qkv, out)
    return out, values, bounds


def _lengths(step: StepShape) -> list[tuple[int, int]]:
    """Contexts that end anywhere in a page; a prefill is chunks of prompts beside one decode."""
    if step.decode_only:
        return [(1, 1 + 37 * index % 1500) for index in range(step.sequences)]
    new = (step.tokens - 1) // (step.sequences - 1)
    rest = step.tokens - 1 - new * (step.sequences - 1)
    return [
        (1, 33),
        *((new + (rest if not index else 0), new + rest + 21 * index) for index in range(step.sequences - 1)),
    ]


def _attention(scene: Scene) -> Outcome:
    model, scale = scene.model, scene.model.head_dim**-0.5
    paged = make_paged(model, _lengths(scene.step), scene.dtype, scene.generator, layers=2)
    query = scene.draw(len(paged.positions), model.heads, model.head_dim)
    arguments = paged.kv_pages, paged.page_table, paged.query_start, paged.context_lens, LAYER, scale, model.window
    out = paged_attention(scene.changed(query), *arguments)
    values = torch.zeros(out.shape, dtype=torch.float64, device=out.device)
    bounds, token = torch.zeros_like(values), 0
    for row, (new, context) in enumerate(paged.lengths):
        pages = paged.page_table[row, : -(-context // paged.kv_pages.shape[3])]
        cells = paged.kv_pages[pages, LAYER].transpose(0, 1).flatten(1, 2)[:, :context].double()
        k, v = cells.repeat_interleave(model.heads // model.kv_heads, dim=2)
        q = query[token : token + new].double()
        position = torch.arange(context - new, context, device=out.device)[:, None]
        key = torch.arange(context, device=out.device)
        hidden = (key > position) | ((position - key >= model.window) if model.window else torch.zeros_like(key > key))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
        size = torch.einsum("qhd,khd->hqk", q.abs(), k.abs()).masked_fill(hidden, 0).amax(-1)
        relative = 2 * (model.head_dim + 2) * EPS * scale * size + (2 * context + 8) * EPS
        values[token : token + new] = torch.einsum("hqk,khd->qhd", weights, v)
        bounds[token : token + new] = relative.T[..., None] * torch.einsum("hqk,khd->qhd", weights, v.abs())
        token += new
    return out, values, bounds + scene.eps * values.abs()


def _store(scene: Scene) -> Outcome:
    model, half = scene.model, scene.model.head_dim // 2
    paged = make_paged(model, _lengths(scene.step), scene.dtype, scene.generator, layers=2)
    fused = scene.draw(len(paged.positions), model.heads + 2 * model.kv_heads, model.head_dim)
    query, key, value = fused.split_with_sizes([model.heads, model.kv_heads, model.kv_heads], dim=1)
    frequency = 1e4 ** -(torch.arange(half, device=fused.device).double() / half)
    angles = torch.arange(2048, device=fused.device)[:, None] * frequency
    cos_sin = torch.stack((angles.cos(), angles.sin()), dim=1).float()
    at, slots = paged.positions, paged.slot_mapping
    rotated = store_kv(scene.changed(query), key, value, cos_sin, at, paged.kv_pages, slots, LAYER)
    page, slot = slots // paged.kv_pages.shape[3], slots % paged.kv_pages.shape[3]
    stored = paged.kv_pages[page, LAYER, :, slot]
    heads = torch.cat((query, key), dim=1).double()
    pairs = torch.complex(heads[..., :half], heads[..., half:])
    turned = pairs * torch.polar(torch.ones_like(angles[:1]), angles[at])[:, None]
    values = torch.cat((torch.cat((turned.real, turned.imag), dim=-1), value.double()), dim=1)
    size = (pairs.real.abs() + pairs.imag.abs()).repeat(1, 1, 2)
    bounds = torch.cat((3 * EPS * size, torch.zeros_like(value.double())), dim=1) + scene.eps * values.abs()
    return torch.cat((rotated, stored[:, 0], stored[:, 1]), dim=1), values, bounds


def _norm(scene: Scene) -> Outcome:
    x, residual, weight = (scene.draw(rows, scene.model.hidden) for rows in (scene.step.tokens, scene.step.tokens, 1))
    normed, total = rms_norm(scene.changed(x), weight[0], NORM_EPS, residual)
    added = x.double() + residual.double()
    wide = (x + residual).double()
    values = weight.double() * wide / (wide.square().mean(-1, keepdim=True) + NORM_EPS).sqrt()
    relative = (x.shape[1] / 2 + 4) * EPS + 2 * scene.eps
    tiny = 4 * torch.finfo(scene.dtype).smallest_normal * scene.eps
    bounds = relative * values.abs() + tiny, scene.eps / 2 * added.abs()
    return torch.cat((normed, total)), torch.cat((values, added)), torch.cat(bounds)


def _gate(scene: Scene) -> Outcome:
    gate_up = scene.draw(scene.step.tokens, 2 * scene.model.intermediate)
    gate, up = gate_up.double().chunk(2, dim=1)
    values = F.silu(gate) * up
    tiny = torch.finfo(scene.dtype).smallest_normal * scene.eps * (1 + up.abs())
    # a GPU takes exp(g) as 2^(g log2 e): half a unit of the argument, two of the power and two of the division
    relative = (gate.abs() / 2 + 5) * EPS + 2 * scene.eps
    return silu_and_mul(scene.changed(gate_up)), values, relative * values.abs() + tiny


def _product(scene: Scene) -> Outcome:
    x, weight = scene.draw(scene.step.tokens, scene.model.hidden), scene.draw(sum(scene.model.qkv), scene.model.hidden)
    values = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    out = linear(scene.changed(x), weight)
    return out, values, (x.shape[1] + 1) * EPS * size + scene.eps / 2 * values.abs()


OPS: dict[str, Callable[[Scene], Outcome]] = {
    "rms_norm": _norm,
    "linear": _product,
    "lora_shrink": _shrink,
    "lora_expand": _expand,
    "store_kv": _store,
    "paged_attention": _attention,
    "silu_and_mul": _gate,
}


def rows(
    models: dict[str, ModelShape], steps: dict[str, StepShape], device: torch.device
) -> Iterator[dict[str, object]]:
    """One a comparison; `passed` false = the kernel is wrong, or the comparison would not notice if it were."""
    for name, model in models.items():
        for step_name, step in steps.items():
            for dtype in ADAPTER_DTYPES:
                for op, run in OPS.items():
                    scene = Scene(model, step, dtype, torch.Generator(device).manual_seed(7))
                    share = _share(run, scene)
                    control = _share(
                        run, replace(scene, spoiled=True, generator=torch.Generator(device).manual_seed(7))
                    )
                    case = f"{name} {step_name} {str(dtype).removeprefix('torch.')}"
                    yield {"op": op, "case": case, "share": round(share, 4), "passed": share <= 1 < control}


def _share(run: Callable[[Scene], Outcome], scene: Scene) -> float:
    # fresh memory is NaN while this is on: an element that nobody wrote fails
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with dispatch.force("triton"), torch.inference_mode():
            out, values, bounds = run(scene)
    finally:
        torch.use_deterministic_algorithms(False)
    error = (out.double() - values).abs()
    if not bool(error.isfinite().all()):
        return float("inf")
    exact = bounds == 0
    if bool((error[exact] > 0).any()):
        return float("inf")
    return float((error[~exact] / bounds[~exact]).max()) if not bool(exact.all()) else 0.0
