"""Whole steps of a random model: decode through CUDA graphs and prefill, against the byte and product floor.

The floor of a step is what must be read at least, each weight but the embedding, each distinct adapter and each key and
value once, over the measured read bandwidth; or the products over the measured rate, when these take longer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.gpu import goals
from benchmarks.gpu.inputs import make_batch, make_paged, make_tables, module_shapes
from benchmarks.gpu.machine import Floors, step_seconds
from benchmarks.gpu.shapes import PAGE_SIZE, ModelShape
from gpu_worker.batch import ForwardBatch
from gpu_worker.cuda.executor import CudaGraphs, Executor, call_again
from gpu_worker.models.config import ModelConfig
from gpu_worker.models.decoder import Decoder
from gpu_worker.models.weights import DecoderWeights, LayerWeights, Projection
from kernels import dispatch
from kernels.adapters import AdapterTables

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Workload:
    """`lengths` of every sequence: (new tokens, context); `adapters` of rank `lora_rank`, shared out."""

    label: str
    sequences: int
    new: int
    context: int
    adapters: int
    lora_rank: int = 16


def workloads(*, is_tiny: bool) -> list[Workload]:
    if is_tiny:
        decodes = [Workload("decode", 3, 1, 20, adapters) for adapters in (0, 1, 3)]
        return [*decodes, *(Workload("prefill", 2, 9, 9, adapters) for adapters in (0, 2))]
    decodes = [Workload("decode", 128, 1, 1024, adapters) for adapters in (0, 1, 32, 128)]
    alone = [Workload("decode", 1, 1, 1024, adapters) for adapters in (0, 1)]
    return [*alone, *decodes, *(Workload("prefill", 4, 512, 512, adapters) for adapters in (0, 1, 4))]


def random_decoder(model: ModelShape, dtype: torch.dtype, device: torch.device, max_context: int) -> Decoder:
    config = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "hidden_size": model.hidden,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.kv_heads,
            "head_dim": model.head_dim,
            "intermediate_size": model.intermediate,
            "vocab_size": model.vocab,
            "max_position_embeddings": max_context,
        }
    )
    shapes = module_shapes(model)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=device).normal_(0, columns**-0.5)

    def projection(*modules: str) -> Projection:
        outs = tuple(shapes[module][1] for module in modules)
        return Projection(weight(sum(outs), shapes[modules[0]][0]), None, shapes[modules[0]][0], outs)

    def layer() -> LayerWeights:
        ones = torch.ones(model.hidden, dtype=dtype, device=device)
        qkv, gate_up = projection("q_proj", "k_proj", "v_proj"), projection("gate_proj", "up_proj")
        return LayerWeights(ones, qkv, None, None, projection("o_proj"), ones, gate_up, projection("down_proj"))

    layers = tuple(layer() for _ in range(model.layers))
    ends = weight(model.vocab, model.hidden), weight(model.vocab, model.hidden)
    norm = torch.ones(model.hidden, dtype=dtype, device=device)
    return Decoder(config, DecoderWeights(ends[0], layers, norm, ends[1]))


def floor_seconds(model: ModelShape, work: Workload, size: int, floors: Floors) -> float:
    """`size`: bytes of an element."""
    per_layer = sum(inputs * outputs for inputs, outputs in module_shapes(model).values())
    lora = sum(inputs + outputs for inputs, outputs in module_shapes(model).values()) * work.lora_rank
    tokens, head = work.sequences * work.new, model.hidden * model.vocab
    kv = 2 * work.sequences * work.context * model.kv_heads * model.head_dim
    read = model.layers * (per_layer + work.adapters * lora + kv) + head
    # a token's products with the keys and the values that it sees: half of the chunk it is in, on average
    pairs = tokens * (work.context - (work.new - 1) / 2)
    attention = 4.0 * model.layers * model.heads * model.head_dim * pairs
    weights = tokens * model.layers * (per_layer + (lora if work.adapters else 0)) + work.sequences * head
    return floors.seconds(float(size * read), 2.0 * weights + attention)


def on_cpu(tables: AdapterTables) -> AdapterTables:
    names = ("page_table", "start_unit", "lora_rank", "scaling", "dtype")
    return replace(tables, **{name: getattr(tables, name).to(CPU) for name in names})


def _batch(model: ModelShape, work: Workload, dtype: torch.dtype, generator: torch.Generator) -> ForwardBatch:
    """With its indices on the CPU, as the model runner makes it, and one page behind those of its sequences."""
    lengths = [(work.new, work.context)] * work.sequences
    paged = make_paged(model, [*lengths, (0, PAGE_SIZE)], dtype, generator)
    last = int(paged.page_table[-1, 0])
    swap = paged.page_table.clone()
    # the spare sequence's page goes to the end of the pool, where the executor pads
    swap[paged.page_table == last], swap[paged.page_table == len(paged.kv_pages) - 1] = len(paged.kv_pages) - 1, last
    own = paged.slot_mapping // PAGE_SIZE
    slots = torch.where(own == len(paged.kv_pages) - 1, last, own) * PAGE_SIZE + paged.slot_mapping % PAGE_SIZE
    paged = replace(
        paged,
        page_table=swap[:-1],
        query_start=paged.query_start[:-1],
        context_lens=paged.context_lens[:-1],
        slot_mapping=slots,
        lengths=tuple(lengths),
    )
    ranks = [work.lora_rank] * work.adapters
    tables = on_cpu(make_tables(model, ranks, dtype, generator, MODULES)) if ranks else None
    return make_batch(model, paged, tables, CPU)


def rows(
    model_name: str, model: ModelShape, decoder: Decoder, floors: Floors, generator: torch.Generator
) -> Iterator[dict[str, object]]:
    device, is_tiny, dtype = generator.device, generator.device.type == "cpu", decoder.dtype
    base: dict[tuple[str, int], float] = {}
    for work in workloads(is_tiny=is_tiny):
        batch = _batch(model, work, dtype, generator)
        capture = call_again if is_tiny else CudaGraphs()
        executor = Executor(decoder, batch.kv_pages, len(batch.kv_pages) - 1, work.sequences, capture)
        run = partial(executor.forward, batch)
        with dispatch.force("triton" if is_tiny else ""), torch.inference_mode():
            if not bool(run().isfinite().all()):
                raise ArithmeticError(f"{work} gives logits that are not finite")
            took = step_seconds(run, device)
        before = base.setdefault((work.label, work.sequences), took)
        floor = floor_seconds(model, work, dtype.itemsize, floors)
        yield {
            "op": f"{work.label}_step",
            "case": f"{model_name} {work.sequences} x {work.new}, context {work.context}, {work.adapters} adapters",
            "milliseconds": round(1e3 * took, 3),
            "floor_milliseconds": round(1e3 * floor, 3),
            "floor_share": round(floor / took, 4),
            "tokens_per_second": round(work.sequences * work.new / took, 1),
            "lora_tax": round(took / before - 1, 4),
            **_goal(work, took, before, floor),
        }
        del batch, executor, run


def _goal(work: Workload, took: float, before: float, floor: float) -> dict[str, object]:
    """Of a full batch of decodes: what one adapter costs, and what one of its own for each sequence comes to."""
    if work.new > 1 or work.sequences == 1:
        return {}
    if work.adapters == 1:
        return goals.at_most("lora_tax", took / before - 1, 0.03)
    return goals.at_most("over_floor", took / floor, 1.15) if work.adapters == work.sequences else {}
