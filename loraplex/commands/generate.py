"""`loraplex generate`."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import cast

from loraplex.commands.terminal import gateway_client, gateway_option
from loraplex.requests import GenerateOptions, Prompt
from loraplex.results import Generation

_EPILOG = """\
examples:
  loraplex generate "Once upon a time"                          the base model
  loraplex generate --adapter pirate "Once upon a time"         the same weights plus one adapter
  loraplex generate --chat --system "Be brief." "What is LoRA?" a question, through the model's chat template
  loraplex generate --temperature 0 --max-tokens 20 "2 + 2 ="   the most likely tokens, at most 20
  loraplex generate --seed 7 "Tell me"                          the same answer every time
  loraplex generate --stop "\\n" --stop "END" "A line:"          up to the end of the line, or to END
  loraplex generate --n 3 --top-p 0.9 "A name for a cat:"       three answers to the same prompt
  loraplex generate --json --logprobs 5 "The capital of France" everything there is to know, for a program
"""

# Flag, type, metavar and help of the options that are passed on under their own names.
_NUMBERS: Sequence[tuple[str, type, str, str]] = (
    ("max_tokens", int, "N", "length of the answer at most [128]"),
    ("min_tokens", int, "N", "nothing ends the answer before [0]"),
    ("temperature", float, "T", "0 (greedy) to 10 (wild) [1.0]"),
    ("top_p", float, "P", "draw from the likeliest tokens that have this much probability together [1.0]"),
    ("top_k", int, "K", "draw from this many of the likeliest tokens [0, all]"),
    ("min_p", float, "P", "draw from tokens with this share of the likeliest one's probability [0, all]"),
    ("presence_penalty", float, "X", "-2 to 2, against tokens that are in the answer [0]"),
    ("frequency_penalty", float, "X", "-2 to 2, the same for each time they are [0]"),
    ("repetition_penalty", float, "X", "above 0 to 10, against tokens of prompt and answer [1.0]"),
    ("seed", int, "N", "makes a draw repeatable [a new one each time]"),
    ("n", int, "N", "answers to the same prompt, 1 to 16 [1]"),
    ("logprobs", int, "K", "log-probabilities of the answer with K alternatives; with --json"),
    ("prompt_logprobs", int, "K", "the same for the prompt; with --json"),
    ("priority", int, "N", "higher goes first within the tenant [0]"),
)
_FLAGS = (
    ("echo", "put the prompt in front of the answer"),
    ("ignore_eos", "go on after the model's end of sequence"),
    ("include_stop", "keep the stop string in the answer"),
    ("return_token_ids", "give the token ids too; with --json"),
)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "generate",
        parents=[gateway_option()],
        help="send a prompt and print the answer as it is produced",
        description="Sends a prompt to a gateway and prints the answer as it is produced.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--adapter", metavar="ID", default="", help="the adapter that answers [the base model]")
    parser.add_argument("--chat", action="store_true", help="PROMPT is what a user says; the model's template is used")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first; with --chat")
    for name, kind, metavar, text in _NUMBERS:
        parser.add_argument(_flag(name), type=kind, metavar=metavar, help=text)
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="end the answer before this; may be given again"
    )
    for name, text in _FLAGS:
        parser.add_argument(_flag(name), action="store_const", const=True, help=text)
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="give up after this long [never]")
    parser.add_argument("--no-stream", action="store_true", help="print the answer once it is whole")
    parser.add_argument("--json", action="store_true", help="print the whole answer as one line of JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    options, prompt, adapter = _options(arguments), _prompt(arguments), arguments.adapter
    # Answers that are produced at the same time would be printed into each other.
    whole = arguments.no_stream or arguments.json or options.get("n", 1) > 1
    with gateway_client(arguments) as client:
        if whole:
            answer = client.generate(prompt, adapter, timeout=arguments.timeout, **options)
            print(json.dumps(asdict(answer)) if arguments.json else _shown(answer))
            return 0
        for delta in client.stream(prompt, adapter, timeout=arguments.timeout, **options):
            print(delta.text, end="", flush=True)
        print()
    return 0


def _prompt(arguments: argparse.Namespace) -> Prompt:
    if not arguments.chat:
        return str(arguments.prompt)
    turns = [("system", arguments.system), ("user", arguments.prompt)]
    return [{"role": role, "content": content} for role, content in turns if content is not None]


def _options(arguments: argparse.Namespace) -> GenerateOptions:
    """Only what was given: the gateway has the defaults."""
    names = [*(name for name, *_ in _NUMBERS), *(name for name, _ in _FLAGS), "stop"]
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return cast("GenerateOptions", given)


def _shown(answer: Generation) -> str:
    if len(answer.outputs) == 1:
        return answer.text
    return "\n".join(f"[{output.index}] {output.text}" for output in answer.outputs)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
