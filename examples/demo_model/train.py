"""Train the demo model: a byte-level Llama of a million parameters and six LoRA adapters, on a CPU.

Writes `base/` and `adapters/<name>/`, then scores what it wrote on words it never trained on and fails
when an adapter misses its skill or the base knows a skill without being told which.
"""

import argparse
import json
import random
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, Python looks only in this folder

from examples.demo_model import scoring
from examples.demo_model.data import adapter_examples, base_examples
from examples.demo_model.loop import Progress, Recipe, train
from examples.demo_model.tokenizer import BOS_ID, EOS_ID, MAX_POSITIONS, PAD_ID, VOCAB_SIZE, save_tokenizer
from examples.demo_model.words import held_out_words

HERE = Path(__file__).resolve().parent
BASE_NAME = "loraplex-demo"
TEST_WORDS = 200

BASE_RECIPE = Recipe(steps=1500, batch_size=128, peak_learning_rate=3e-3, warmup_steps=100, weight_decay=0.05)
ADAPTER_RECIPE = Recipe(steps=250, batch_size=64, peak_learning_rate=5e-3, warmup_steps=20, weight_decay=0.0)

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """Ranks, targets and scaling differ on purpose: together the six cover what a server has to handle."""

    lora_rank: int
    target_modules: tuple[str, ...]
    use_rslora: bool = False


ADAPTERS = {
    "reverse": AdapterShape(16, ATTENTION + MLP),
    "sort": AdapterShape(32, ATTENTION),
    "upper": AdapterShape(4, ("q_proj", "v_proj")),
    "rot13": AdapterShape(8, ATTENTION),
    "double": AdapterShape(8, MLP),
    "devowel": AdapterShape(16, ATTENTION, use_rslora=True),
}


def new_base(seed: int) -> LlamaForCausalLM:
    """A fresh base model: grouped-query attention and an output head of its own."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=MAX_POSITIONS,
            rms_norm_eps=1e-6,
            initializer_range=0.04,
            tie_word_embeddings=False,
            pad_token_id=PAD_ID,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
        )
    )


def train_base(directory: Path, recipe: Recipe, seed: int) -> None:
    model = new_base(seed)
    train(model, base_examples(random.Random(f"{seed} base")), recipe, Progress("base", recipe.steps))
    model.save_pretrained(directory / "base")
    save_tokenizer(directory / "base")
    make_readable(directory / "base")


def train_adapter(directory: Path, name: str, recipe: Recipe, seed: int) -> None:
    shape = ADAPTERS[name]
    config = LoraConfig(
        r=shape.lora_rank,
        lora_alpha=2 * shape.lora_rank,
        target_modules=list(shape.target_modules),
        use_rslora=shape.use_rslora,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    model = get_peft_model(scoring.load_base(directory), config)
    examples = adapter_examples(name, random.Random(f"{seed} {name}"))
    train(model, examples, recipe, Progress(f"adapter {name}", recipe.steps))
    folder = directory / "adapters" / name
    model.save_pretrained(folder, save_embedding_layers=False)
    tidy_adapter(folder)
    make_readable(folder)


def tidy_adapter(folder: Path) -> None:
    """Make the folder fit to publish: no path of this machine, no order by chance, no template of a README."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = BASE_NAME
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2) + "\n")
    (folder / "README.md").unlink(missing_ok=True)


def make_readable(folder: Path) -> None:
    """safetensors writes for the owner alone; a container may read as another user."""
    for path in folder.iterdir():
        path.chmod(0o644)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The full run takes about six minutes on two cores; OMP_NUM_THREADS sets how many it uses.",
    )
    add = parser.add_argument
    add("--out", type=Path, default=HERE, metavar="DIR", help="where base/ and adapters/ go (default: this folder)")
    add("--steps", type=int, default=BASE_RECIPE.steps, metavar="N", help="steps of the base (default: %(default)s)")
    add(
        "--adapter-steps",
        type=int,
        default=ADAPTER_RECIPE.steps,
        metavar="N",
        help="steps of each adapter (default: %(default)s)",
    )
    add("--only", choices=("base", "adapters"), help="train one half; `adapters` builds on the base already in DIR")
    add("--seed", type=int, default=0, metavar="N", help="of the weights and the words (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.only == "adapters" and not (options.out / "base" / "config.json").exists():
        parser.error(f"there is no base in {options.out}: train one first, or leave out --only")
    return options


def report(scores: scoring.Scores, seconds: float) -> int:
    """Print the table; the exit status says whether the model will do."""
    print(f"\nExact match on {TEST_WORDS} held-out words, after {seconds:.0f} s:\n\n{scoring.format_scores(scores)}")
    missed = scoring.shortcomings(scores)
    for sentence in missed:
        print(f"MISSED: {sentence}", file=sys.stderr)
    return 1 if missed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT 0.21 reads it
    started = time.monotonic()
    words = held_out_words(TEST_WORDS)
    if options.only != "adapters":
        train_base(options.out, replace(BASE_RECIPE, steps=options.steps), options.seed)
    scores = scoring.score_base(options.out, words)
    if options.only != "base":
        for name in ADAPTERS:
            train_adapter(options.out, name, replace(ADAPTER_RECIPE, steps=options.adapter_steps), options.seed)
        scores |= scoring.score_adapters(options.out, words)
    return report(scores, time.monotonic() - started)


if __name__ == "__main__":
    sys.exit(main())
