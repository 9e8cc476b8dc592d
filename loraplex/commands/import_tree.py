"""`loraplex adapters import TREE`: every adapter that can be taken is, and a table says why the others are not."""

import argparse

from loraplex.commands.terminal import ProgressLine, bar, gateway_client, one_line, table
from loraplex.errors import (
    AlreadyExists,
    Conflict,
    FailedPrecondition,
    InvalidArgument,
    LoraplexError,
    ResourceExhausted,
)
from loraplex.folders import find_adapters

# What is wrong with one adapter; anything else is wrong with all of them.
_REFUSALS = (AlreadyExists, Conflict, FailedPrecondition, InvalidArgument, ResourceExhausted)


def run(arguments: argparse.Namespace) -> int:
    """1 when an adapter was refused, else 0."""
    adapters = find_adapters(arguments.tree)
    refused: list[list[object]] = []
    warnings: list[str] = []
    created, progress = 0, ProgressLine()
    with gateway_client(arguments) as client:
        for count, (adapter_id, folder) in enumerate(adapters.items()):
            progress.show(f"{bar(count, len(adapters))} {count} of {len(adapters)}: {adapter_id}")
            try:
                result = client.adapters.push(adapter_id, folder, replace=arguments.replace, plain_files=True)
            except _REFUSALS as error:
                refused.append(_row(adapter_id, error))
                continue
            except LoraplexError:
                progress.clear()
                raise
            created += result.created
            warnings += [f"{adapter_id}: {warning}" for warning in result.warnings]
    progress.clear()
    unchanged = len(adapters) - created - len(refused)
    print(f"imported {created}, unchanged {unchanged}, refused {len(refused)}")
    for warning in warnings:
        print(f"warning: {warning}")
    if refused:
        print(table(["ADAPTER", "REASON", "WHY"], refused))
    return 1 if refused else 0


def _row(adapter_id: str, error: LoraplexError) -> list[object]:
    return [adapter_id, error.reason, one_line(error.message)]
