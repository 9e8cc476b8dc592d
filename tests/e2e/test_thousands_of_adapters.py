"""Two thousand adapters through a pool of fifty: every answer right, and no more memory than the budgets say."""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from loraplex import AsyncClient
from loraplex.fleet import Fleet
from tests.e2e.support import assert_books_balance, metric, running_fleet
from tests.e2e.tiny_model import TinyModel

NUM_ADAPTERS = 2000
RANKS = (8, 16, 32, 64)
NUM_TOKENS = 4
PARALLEL = 48
# 12 KiB a page: one of rank 8 takes 2 pages, one of rank 64 takes 14; fifty of them and some KV.
POOL_BYTES = 440 * 12 * 1024
HOST_BYTES, CACHE_BYTES = 16 << 20, 48 << 20
# What the two processes may grow by for other reasons: allocator caches, indexes of two thousand names, gRPC.
SLACK_BYTES = 96 << 20
# Below this distance of the best logit to the second, rounding may decide.
MIN_MARGIN = 1e-3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

# PEFT's names for two modules of a Llama, and their [out, in].
MODULES = {"self_attn.q_proj": (64, 64), "self_attn.v_proj": (32, 64)}
NUM_LAYERS = 3
SCALING = 2.0


@dataclass(frozen=True)
class Sample:
    """One adapter: its weights are drawn from its number."""

    number: int

    @property
    def name(self) -> str:
        return f"a{self.number:04d}"

    @property
    def lora_rank(self) -> int:
        return RANKS[self.number % len(RANKS)]

    @property
    def prompt(self) -> list[int]:
        return [1] + [3 + (7 * position + 13 * self.number) % 250 for position in range(12)]

    def matrices(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Module → A `[rank, in]`, B `[out, rank]`."""
        generator = torch.Generator().manual_seed(self.number)
        found = {}
        for layer in range(NUM_LAYERS):
            for module, (out_features, in_features) in MODULES.items():
                a = torch.randn(self.lora_rank, in_features, generator=generator) * in_features**-0.5
                b = torch.randn(out_features, self.lora_rank, generator=generator) * 0.3 * self.lora_rank**-0.5
                found[f"model.layers.{layer}.{module}"] = (a, b)
        return found

    def save(self, folder: Path) -> Path:
        folder.mkdir()
        tensors = {}
        for name, (a, b) in self.matrices().items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self.lora_rank,
            "lora_alpha": int(SCALING * self.lora_rank),
            "target_modules": ["q_proj", "v_proj"],
            "bias": "none",
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder


class Oracle:
    """transformers, with the adapter's product added to the weights themselves."""

    def __init__(self, base: Path) -> None:
        self._model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    @torch.inference_mode()
    def certain(self, sample: Sample) -> list[int]:
        """Greedy tokens up to the first that rounding could change."""
        originals = {}
        for name, (a, b) in sample.matrices().items():
            weight = self._model.get_submodule(name).weight
            originals[name] = weight.clone()
            weight += SCALING * (b @ a)
        tokens: list[int] = []
        for _ in range(NUM_TOKENS):
            best = self._model(torch.tensor([sample.prompt + tokens])).logits[0, -1].topk(2)
            if best.values[0] - best.values[1] < MIN_MARGIN:
                break
            tokens.append(int(best.indices[0]))
        for name, original in originals.items():
            self._model.get_submodule(name).weight.copy_(original)
        return tokens


def resident_bytes(fleet: Fleet) -> dict[str, int]:
    """RSS of the worker's face and of its engine."""
    face = fleet.workers[0].pid
    (engine,) = Path(f"/proc/{face}/task/{face}/children").read_text().split()
    lines = {name: Path(f"/proc/{pid}/status").read_text() for name, pid in (("face", face), ("engine", engine))}
    return {name: int(text.split("VmRSS:")[1].split()[0]) * 1024 for name, text in lines.items()}


async def push_all(client: AsyncClient, samples: list[Sample], folder: Path) -> None:
    slots = asyncio.Semaphore(8)

    async def push(sample: Sample) -> None:
        async with slots:
            await client.adapters.push(sample.name, sample.save(folder / sample.name))

    await asyncio.gather(*map(push, samples))


async def ask_all(client: AsyncClient, samples: list[Sample]) -> dict[str, list[int]]:
    slots, answers = asyncio.Semaphore(PARALLEL), dict[str, list[int]]()

    async def ask(sample: Sample) -> None:
        async with slots:
            answer = await client.generate(
                sample.prompt,
                sample.name,
                temperature=0.0,
                max_tokens=NUM_TOKENS,
                ignore_eos=True,
                return_token_ids=True,
                timeout=1000,
            )
            answers[sample.name] = list(answer.token_ids)

    await asyncio.gather(*map(ask, samples))
    return answers


async def test_two_thousand_adapters_in_the_room_of_fifty(
    tiny: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [Sample(number) for number in range(NUM_ADAPTERS)]
    budgets = [f"--memory={POOL_BYTES}", f"--host-memory={HOST_BYTES}", f"--cache-size={CACHE_BYTES}"]
    with running_fleet(tiny.base, tmp_path / "data", {}, gpu_worker=budgets) as fleet:
        (tmp_path / "adapters").mkdir()
        async with AsyncClient(fleet.gateway.address) as client:
            await push_all(client, samples, tmp_path / "adapters")
            await ask_all(client, samples[:PARALLEL])
            before = resident_bytes(fleet)
            answers = await ask_all(client, samples)
            after = resident_bytes(fleet)
        worker = fleet.workers[0]
        usage = assert_books_balance(worker)
        evictions = metric(worker, "loraplex_adapter_evictions_total")
    # The worker has stopped: while it runs, what was asked for ahead still comes and pushes older files out.
    cached = sum(path.stat().st_size for path in (tmp_path / "data" / "cache-worker-0").glob("*.packed"))
    growth = sum(after.values()) - sum(before.values())
    with capsys.disabled():
        sizes = {name: f"{before[name] >> 20} -> {after[name] >> 20} MiB" for name in before}
        print(f"\nRSS {sizes}, cache folder {cached >> 20} MiB, {evictions:.0f} evictions, {usage.memory}")
    oracle = Oracle(tiny.base)
    expected = {sample.name: oracle.certain(sample) for sample in samples}
    assert [name for name, tokens in expected.items() if answers[name][: len(tokens)] != tokens] == []
    # The oracle is certain of nearly everything, so agreement means something.
    assert sum(map(len, expected.values())) > 0.97 * NUM_ADAPTERS * NUM_TOKENS
    assert len({tuple(tokens) for tokens in answers.values()}) > NUM_ADAPTERS // 2
    assert evictions > NUM_ADAPTERS - 100
    assert growth < POOL_BYTES + HOST_BYTES + SLACK_BYTES
    assert usage.memory.host_adapter_bytes <= HOST_BYTES
    assert cached <= CACHE_BYTES
