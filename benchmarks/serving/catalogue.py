"""Every system by the name one types, and which process it lives in."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """`system` and `mode` stand in the rows. Entries with the same `host` share one process, which is told `how`."""

    system: str
    mode: str
    host: str
    how: str = ""
    # The workload's requests without their adapters, answered by the base model.
    of_base: bool = False
    # A warm-up as long as the run would cost minutes: a few short requests do.
    slow: bool = False
    # Somebody else's arithmetic: wrong tokens are counted and said. Ours and PEFT's must be right.
    may_differ: bool = False


ENTRIES = {
    "engine": Entry("loraplex", "engine", "engine"),
    "lora-off": Entry("loraplex", "engine, LoRA off", "engine", of_base=True),
    "unary": Entry("loraplex", "fleet, unary", "fleet-unary", "unary"),
    "stream": Entry("loraplex", "fleet, streaming", "fleet-stream", "stream"),
    "peft": Entry("peft", "mixed, batches of 32", "peft", "mixed", slow=True),
    "peft-grouped": Entry("peft", "grouped, batches of 32", "peft", "grouped", slow=True),
    "peft-alone": Entry("peft", "one by one", "peft", "alone", slow=True),
    "llama-cpp": Entry("llama.cpp", "fp32, grouped", "llama-cpp", slow=True, may_differ=True),
    "vllm": Entry("vllm", "CPU, LoRA", "vllm", slow=True, may_differ=True),
    "vllm-lora-off": Entry("vllm", "CPU, LoRA off", "vllm-lora-off", of_base=True, may_differ=True),
    "eager": Entry("baseline", "our engine, not recorded", "eager"),
    "padded-bmm": Entry("baseline", "padded bmm", "padded-bmm"),
    "divided": Entry("baseline", "memory divided", "divided"),
    "slots": Entry("baseline", "reserved slots", "slots"),
    "merge": Entry("baseline", "merge, one at a time", "merge"),
}
ORACLE = "peft"
# Host -> its environment under build/peers
PEERS = {"llama-cpp": "llama", "vllm": "vllm", "vllm-lora-off": "vllm"}
BASELINES = ("eager", "padded-bmm", "divided", "slots", "merge")


def chosen(names: str) -> list[str]:
    """Names of a comma-separated list. Raises ValueError naming the unknown one and the known ones."""
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if name not in ENTRIES:
            raise ValueError(f"{name!r} is no system; known: {', '.join(ENTRIES)}")
    return found
