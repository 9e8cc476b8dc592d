"""`loraplex adapters push|list`."""

import argparse
import time

from loraplex.client import Client
from loraplex.commands.terminal import DIGEST_CHARACTERS, ProgressLine, gateway_option, table
from loraplex.results import Adapter

_EPILOG = """\
examples:
  loraplex adapters push pirate ./pirate-lora             upload a PEFT folder under the id `pirate`
  loraplex adapters push pirate ./better-lora --replace   move the id to other weights; running requests finish
  loraplex adapters list                                  what may be named in --adapter
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "adapters",
        help="upload and list adapters",
        description="Uploads and lists adapters. An adapter is a PEFT folder with adapter_config.json and\n"
        "adapter_model.safetensors. Every upload is an immutable version; the id points to one of them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    push = verbs.add_parser("push", parents=[gateway_option()], help="upload a PEFT folder")
    push.add_argument("id", metavar="ID", help="a-z, 0-9, '.', '_' and '-', at most 64 characters")
    push.add_argument("folder", metavar="FOLDER")
    push.add_argument("--replace", action="store_true", help="move the id when it already has other weights")
    push.set_defaults(run=run_push)
    listing = verbs.add_parser("list", parents=[gateway_option()], help="list the adapters")
    listing.set_defaults(run=run_list)


def run_push(arguments: argparse.Namespace) -> int:
    progress = ProgressLine()

    def show(sent_bytes: int, total_bytes: int) -> None:
        progress.show(f"{arguments.id}: {sent_bytes / max(1, total_bytes):.0%}")

    with Client(arguments.gateway) as client:
        try:
            result = client.adapters.push(arguments.id, arguments.folder, replace=arguments.replace, on_progress=show)
        finally:
            progress.clear()
    state = "pushed" if result.created else "unchanged"
    print(f"{state} {result.adapter.adapter_id} {result.adapter.adapter_version}")
    for warning in result.warnings:
        print(f"warning: {warning}")
    return 0


def run_list(arguments: argparse.Namespace) -> int:
    with Client(arguments.gateway) as client:
        adapters = client.adapters.list()
    print(
        table(["ADAPTER", "VERSION", "RANK", "MIB", "CREATED", "BASE MODEL"], [_row(adapter) for adapter in adapters])
    )
    return 0


def _row(adapter: Adapter) -> list[object]:
    created = time.strftime("%Y-%m-%d %H:%M", time.localtime(adapter.created_at_seconds))
    mebibytes = f"{adapter.packed_bytes / 2**20:.1f}"
    version = adapter.adapter_version[:DIGEST_CHARACTERS]
    return [adapter.adapter_id, version, adapter.max_lora_rank, mebibytes, created, adapter.base_model]
