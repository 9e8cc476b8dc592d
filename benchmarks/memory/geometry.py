"""Pages, bytes and waste worked through on six models: `python -m benchmarks.memory.geometry` writes docs/memory.md.

Nothing is measured here: the numbers come from the same code that packs adapters and cuts the pool.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.base_model import BaseGeometry
from common.packing import ELEMENT_BYTES, MODULES, ModuleSpec, PackedLayout, plan
from gpu_worker.memory.geometry import PageGeometry

PAGE = Path(__file__).resolve().parents[2] / "docs" / "memory.md"
BEGIN, END = "<!-- geometry: begin -->", "<!-- geometry: end -->"
DTYPE, PAGE_SIZE = "bfloat16", 16
RANKS = (1, 8, 64)
TARGETS = {"attention": MODULES[:4], "all linear": MODULES}

# num_layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary, context: from each model's config.json
MODELS = {
    "Llama-2-7B": BaseGeometry(32, 4096, 11008, 32, 32, 128, 32000, 4096),
    "Llama-3.1-8B": BaseGeometry(32, 4096, 14336, 32, 8, 128, 128256, 131072),
    "Qwen2.5-7B": BaseGeometry(28, 3584, 18944, 28, 4, 128, 152064, 131072),
    "Qwen2.5-0.5B": BaseGeometry(24, 896, 4864, 14, 2, 64, 151936, 32768),
    "Gemma-2-9B": BaseGeometry(42, 3584, 14336, 16, 8, 256, 256000, 8192),
    "Mistral-7B": BaseGeometry(32, 4096, 14336, 32, 8, 128, 32768, 32768),
}


@dataclass(frozen=True, slots=True)
class Example:
    """One adapter on one model."""

    model: str
    targets: str
    lora_rank: int
    parameter_bytes: int
    packed_bytes: int
    num_pages: int
    page_bytes: int

    @property
    def overhead(self) -> float:
        """Share by which packing exceeds the parameters: rows padded to 128 bytes."""
        return self.packed_bytes / self.parameter_bytes - 1

    @property
    def waste(self) -> float:
        """Share of its pages that the adapter does not fill."""
        return 1 - self.packed_bytes / (self.num_pages * self.page_bytes)


def pages_of(model: BaseGeometry) -> PageGeometry:
    return PageGeometry(model.num_layers, model.num_kv_heads, model.head_dim, ELEMENT_BYTES[DTYPE], PAGE_SIZE)


def layout_of(model: BaseGeometry, modules: tuple[str, ...], lora_rank: int) -> PackedLayout:
    shapes = model.module_shapes
    specs = (
        ModuleSpec(layer, module, lora_rank, 1.0, *shapes[module])
        for layer in range(model.num_layers)
        for module in modules
    )
    return plan(specs, DTYPE)


def examples() -> Iterator[Example]:
    for name, model in MODELS.items():
        geometry = pages_of(model)
        for targets, modules in TARGETS.items():
            for rank in RANKS:
                packed = layout_of(model, modules, rank).total_bytes
                features = sum(sum(model.module_shapes[module]) for module in modules)
                parameters = model.num_layers * features * rank * ELEMENT_BYTES[DTYPE]
                num_pages = geometry.pages_for_bytes(packed)
                yield Example(name, targets, rank, parameters, packed, num_pages, geometry.page_bytes)


def tables() -> str:
    lines = [
        "| model | KV of a token | a page of 16 tokens | pages in 40 GiB | tokens in them |",
        "|---|---|---|---|---|",
    ]
    for name, model in MODELS.items():
        geometry = pages_of(model)
        pages = 40 * 2**30 // geometry.page_bytes
        cells = [name, f"{geometry.kv_bytes_per_token:,} B", f"{geometry.page_bytes:,} B", f"{pages:,}"]
        lines.append("| " + " | ".join([*cells, f"{pages * PAGE_SIZE:,}"]) + " |")
    lines += ["", "| model | targets | rank | parameters | packed | padding | pages | waste | in KV tokens |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for example in examples():
        cells = [example.model, example.targets, str(example.lora_rank)]
        cells += [f"{example.parameter_bytes:,} B", f"{example.packed_bytes:,} B", f"{example.overhead:.2%}"]
        cells += [f"{example.num_pages:,}", f"{example.waste:.1%}", f"{example.num_pages * PAGE_SIZE:,}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def section(text: str) -> str:
    """What stands between the markers of a page."""
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
