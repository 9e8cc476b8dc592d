"""What was promised: ratios of tokens per second in one run, what they must be and what they should be."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Line:
    """`one` over `other`, or the other way round for a cost; each with a name of the catalogue or `name@workload`."""

    text: str
    one: str
    other: str
    # (model, workload) -> (must, goal)
    bounds: dict[tuple[str, str], tuple[float, float]]
    # Smaller is better.
    cost: bool = False
    pool: float | None = None


def _columns(*pairs: tuple[float, float] | None) -> dict[tuple[str, str], tuple[float, float]]:
    keys = (("S", "n8"), ("S", "n64"), ("M", "n8"), ("M", "n64"))
    return {key: pair for key, pair in zip(keys, pairs, strict=False) if pair}


PEERS = (
    Line("PEFT one by one", "engine", "peft-alone", _columns((23, 30), (28, 36), (8.5, 11), (8.5, 11))),
    Line("PEFT best batched mode", "engine", "peft", _columns((5.9, 7.5), (10, 13), (3.0, 4), (3.5, 4.5))),
    Line("llama.cpp fp32, grouped", "engine", "llama-cpp", _columns((2.7, 3.5), (3.8, 5), (1.7, 2.3), (2.3, 3))),
    Line("vLLM CPU with LoRA", "engine", "vllm", _columns((19, 25), (25, 32), (12, 16))),
    Line("vLLM CPU, its LoRA off", "engine", "vllm-lora-off", _columns((0.9, 1.3), None, (0.76, 1.0))),
)

S, M = ("S", "distinct"), ("M", "distinct")
TAX, DISTINCT = {S: (1.6, 1.4), M: (1.3, 1.2)}, {S: (0.9, 0.9), M: (0.9, 0.9)}
# The same adapters from files in bfloat16.
NARROW = "distinct-bf16"
OURS = (
    Line("LoRA tax, 64 distinct adapters", "lora-off", "engine", TAX, cost=True),
    Line("the same with adapters in bfloat16", f"lora-off@{NARROW}", f"engine@{NARROW}", TAX, cost=True),
    Line("64 distinct adapters over one", "engine@distinct", "engine@one", DISTINCT),
    Line("64 distinct adapters in bfloat16 over one", f"engine@{NARROW}", "engine@one", DISTINCT),
    Line("fleet unary over engine", "unary", "engine", {("S", "n64"): (0.7, 0.7), ("M", "n64"): (0.9, 0.9)}),
    Line("fleet streaming over engine", "stream", "engine", {("S", "n64"): (0.45, 0.45), ("M", "n64"): (0.8, 0.8)}),
)

_N64_S, _N64_M = ("S", "n64"), ("M", "n64")
_BMM = {_N64_S: (1.8, 1.8), _N64_M: (1.3, 1.3)}
_MERGE = {("S", "n5"): (1.5, 1.5), ("M", "n5"): (1.5, 1.5)}
ABLATIONS = (
    *(Line("padded bmm", "engine", "padded-bmm", _BMM, pool=p) for p in (1.0, 0.5, 0.25)),
    *(Line("padded bmm, over ours not recorded", "eager", "padded-bmm", _BMM, pool=p) for p in (1.0, 0.5, 0.25)),
    *(Line("memory divided", "engine", "divided", {_N64_S: (1, 1), _N64_M: (1, 1)}, pool=p) for p in (1.0, 0.5, 0.25)),
    Line("reserved rank-64 slots", "engine", "slots", {_N64_S: (1, 1), _N64_M: (1, 1)}, pool=1.0),
    Line("reserved rank-64 slots", "engine", "slots", {_N64_S: (1.2, 1.2), _N64_M: (1.2, 1.2)}, pool=0.5),
    Line("reserved rank-64 slots", "engine", "slots", {_N64_S: (1, 1), _N64_M: (1, 1)}, pool=0.25),
    Line("merge, one at a time, 5 adapters", "engine", "merge", _MERGE, pool=1.0),
)

# A ratio this much below a bound of 1 is noise: runs of one system differ by as much.
NOISE = 0.05
# Share of the multiply-add rate that the machine reaches in registers, and the largest cost of a hop for one stream.
ROOFLINE_M = (0.4, 0.5)
HOP_SECONDS = 0.003
# No token is held longer than this by the fleet.
HELD_SECONDS = 0.05
