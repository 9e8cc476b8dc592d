"""`loraplex adapters push|list|show|rm|alias|import|export`."""

import argparse
import time
from pathlib import Path

from loraplex.commands import import_tree
from loraplex.commands.terminal import DIGEST_CHARACTERS, ProgressLine, bar, gateway_client, gateway_option, table
from loraplex.results import Adapter

_EPILOG = """\
examples:
  loraplex adapters push pirate ./pirate-lora             upload a PEFT folder under the id `pirate`
  loraplex adapters push pirate ./better-lora --replace   move the id to other weights; running requests finish
  loraplex adapters import ./loras                        upload every PEFT folder of a tree
  loraplex adapters list                                  what may be named in --adapter
  loraplex adapters show pirate                           which modules it changes, and how much
  loraplex adapters alias pirate-stable pirate            a second id for what the first points to now
  loraplex adapters export pirate ./copy                  get the files back
  loraplex adapters rm pirate                             remove the id; running requests finish
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "adapters",
        help="upload, list, move and remove adapters",
        description="Manages adapters. An adapter is a PEFT folder with adapter_config.json and\n"
        "adapter_model.safetensors. Every upload is an immutable version; the id points to one of them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    push = verbs.add_parser("push", parents=[gateway_option()], help="upload a PEFT folder")
    push.add_argument("id", metavar="ID", help="a-z, 0-9, '_', '-', and '.' inside, at most 64 characters")
    push.add_argument("folder", metavar="FOLDER")
    push.add_argument("--replace", action="store_true", help="move the id when it already has other weights")
    push.set_defaults(run=run_push)
    listing = verbs.add_parser("list", parents=[gateway_option()], help="list the adapters")
    listing.set_defaults(run=run_list)
    show = verbs.add_parser("show", parents=[gateway_option()], help="show one adapter and what it changes")
    show.add_argument("id", metavar="ID")
    show.set_defaults(run=run_show)
    remove = verbs.add_parser("rm", parents=[gateway_option()], help="remove ids; their bytes go after a grace")
    remove.add_argument("ids", metavar="ID", nargs="+")
    remove.set_defaults(run=run_remove)
    alias = verbs.add_parser("alias", parents=[gateway_option()], help="point an id to what another one points to")
    alias.add_argument("id", metavar="ID", help="the id to make or move")
    alias.add_argument("source", metavar="SOURCE", help="an id, or a version in 64 hex digits")
    alias.add_argument("--expect", metavar="VERSION", default="", help="what ID must point to now; needed to move it")
    alias.set_defaults(run=run_alias)
    importing = verbs.add_parser("import", parents=[gateway_option()], help="upload every PEFT folder of a tree")
    importing.add_argument("tree", metavar="TREE", type=Path)
    importing.add_argument("--replace", action="store_true", help="move ids that already have other weights")
    importing.set_defaults(run=import_tree.run)
    export = verbs.add_parser("export", parents=[gateway_option()], help="write an adapter's files to a folder")
    export.add_argument("id", metavar="ID")
    export.add_argument("folder", metavar="FOLDER")
    export.set_defaults(run=run_export)


def run_push(arguments: argparse.Namespace) -> int:
    progress = ProgressLine()

    def show(sent_bytes: int, total_bytes: int) -> None:
        progress.show(f"{bar(sent_bytes, total_bytes)} {arguments.id} {sent_bytes / max(1, total_bytes):.0%}")

    with gateway_client(arguments) as client:
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
    with gateway_client(arguments) as client:
        adapters = client.adapters.list()
    print(
        table(["ADAPTER", "VERSION", "RANK", "MIB", "CREATED", "BASE MODEL"], [_row(adapter) for adapter in adapters])
    )
    return 0


def run_show(arguments: argparse.Namespace) -> int:
    with gateway_client(arguments) as client:
        adapter = client.adapters.get(arguments.id)
    print(f"adapter     {adapter.adapter_id}")
    print(f"version     {adapter.adapter_version}")
    print(f"base model  {adapter.base_model or '(none recorded)'}")
    print(f"size        {adapter.packed_bytes / 2**20:.1f} MiB, rank up to {adapter.max_lora_rank}")
    print(f"created     {_time(adapter)}")
    rows = [
        [
            effect.module,
            effect.num_layers,
            _range(effect.min_lora_rank, effect.max_lora_rank),
            f"{effect.parameter_bytes / 2**20:.1f}",
            f"{effect.delta_norm:.4g}",
        ]
        for effect in adapter.modules
    ]
    print(table(["MODULE", "LAYERS", "RANK", "MIB", "NORM OF THE DELTA"], rows))
    return 0


def run_remove(arguments: argparse.Namespace) -> int:
    with gateway_client(arguments) as client:
        for adapter_id in arguments.ids:
            print(f"removed {adapter_id} {client.adapters.delete(adapter_id)}")
    return 0


def run_alias(arguments: argparse.Namespace) -> int:
    with gateway_client(arguments) as client:
        version = arguments.source
        if len(version) != 64 or not set(version) <= set("0123456789abcdef"):
            version = client.adapters.get(version).adapter_version
        adapter = client.adapters.set_alias(arguments.id, version, expected_version=arguments.expect)
    print(f"{adapter.adapter_id} -> {adapter.adapter_version}")
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    with gateway_client(arguments) as client:
        client.adapters.export(arguments.id, arguments.folder)
    print(f"exported {arguments.id} to {arguments.folder}")
    return 0


def _row(adapter: Adapter) -> list[object]:
    mebibytes = f"{adapter.packed_bytes / 2**20:.1f}"
    version = adapter.adapter_version[:DIGEST_CHARACTERS]
    return [adapter.adapter_id, version, adapter.max_lora_rank, mebibytes, _time(adapter), adapter.base_model]


def _time(adapter: Adapter) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(adapter.created_at_seconds))


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"
