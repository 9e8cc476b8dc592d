"""`loraplex generate`."""

import argparse

from loraplex.client import Client
from loraplex.commands.terminal import gateway_option
from loraplex.requests import GenerateOptions

_EPILOG = """\
examples:
  loraplex generate "Once upon a time"                         the base model
  loraplex generate --adapter pirate "Once upon a time"        the same weights plus one adapter
  loraplex generate --temperature 0 --max-tokens 20 "2 + 2 ="  the most likely tokens, at most 20
  loraplex generate --seed 7 "Tell me"                         the same answer every time
"""


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
    parser.add_argument("--max-tokens", type=int, metavar="N", help="length of the answer at most [128]")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 (greedy) to 10 (wild) [1.0]")
    parser.add_argument("--seed", type=int, metavar="N", help="makes a draw repeatable [a new one each time]")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="give up after this long [never]")
    parser.add_argument("--no-stream", action="store_true", help="print the answer once it is whole")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    options = _options(arguments)
    with Client(arguments.gateway) as client:
        if arguments.no_stream:
            answer = client.generate(arguments.prompt, arguments.adapter, timeout=arguments.timeout, **options)
            print(answer.text)
            return 0
        for delta in client.stream(arguments.prompt, arguments.adapter, timeout=arguments.timeout, **options):
            print(delta.text, end="", flush=True)
        print()
    return 0


def _options(arguments: argparse.Namespace) -> GenerateOptions:
    """Only what was given: the gateway has the defaults."""
    options: GenerateOptions = {}
    if arguments.max_tokens is not None:
        options["max_tokens"] = arguments.max_tokens
    if arguments.temperature is not None:
        options["temperature"] = arguments.temperature
    if arguments.seed is not None:
        options["seed"] = arguments.seed
    return options
