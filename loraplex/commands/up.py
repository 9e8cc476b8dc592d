"""`loraplex up`."""

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loraplex.client import Client
from loraplex.commands.terminal import ProgressLine, one_line, program, table
from loraplex.errors import LoraplexError, Unavailable
from loraplex.process import FleetError, sigterm_as_interrupt

if TYPE_CHECKING:
    from loraplex.fleet import Fleet, FleetOptions

_EPILOG = """\
examples:
  loraplex up --model ./Llama-3.2-1B                       serve a Hugging Face checkpoint on the CPU
  loraplex up --model ./Llama-3.2-1B --adapters ./loras    and every PEFT folder ./loras/ID as the adapter ID
  loraplex up --model ./Llama-3.2-1B --device cuda --dtype bfloat16 --memory 8GiB
then, in another terminal:
  loraplex generate --adapter ID "Hello"
The services listen on 127.0.0.1 alone, without TLS; docs/operations.md says how a fleet for others is started.
"""


@dataclass(frozen=True)
class Upload:
    """How the upload of one adapter ended; `why` holds the refusal, or the warnings."""

    adapter_id: str
    loaded: bool
    why: str


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "up",
        help="start a whole fleet on this machine",
        description="Starts the four services on this machine, uploads adapters, and serves until Ctrl-C.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of a Hugging Face checkpoint")
    parser.add_argument("--model-name", default="", metavar="NAME", help="what clients see [the folder's name]")
    parser.add_argument("--adapters", type=Path, metavar="DIR", help="folder with one PEFT adapter per sub-folder")
    parser.add_argument("--workers", type=_positive, default=1, metavar="N", help="model replicas [1]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the workers compute [cpu]")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the weights [auto]"
    )
    parser.add_argument("--memory", default="", metavar="SIZE", help="page pool of each worker, for instance 512MiB")
    parser.add_argument("--port", type=_port, default=50051, help="of the gateway; 0 takes a free one [%(default)s]")
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="adapters, caches and logs [one per model in .loraplex]"
    )
    parser.add_argument(
        "--ready-timeout", type=_seconds, default=300.0, metavar="SECONDS", help="for loading the model [300]"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    # Imported here: the rest of the command also works where processes cannot be started so, as on Windows.
    from loraplex.fleet import Fleet

    folders = adapter_folders(arguments.adapters) if arguments.adapters else []
    with sigterm_as_interrupt(), Fleet(_fleet_options(arguments)) as fleet:
        uploads = upload_all(fleet.gateway.address, folders)
        _print_tables(fleet, uploads)
        if uploads and not any(upload.loaded for upload in uploads):
            raise FleetError(f"none of the {len(uploads)} adapters was loaded: {uploads[0].why}")
        _print_ready(fleet, uploads)
        try:
            fleet.wait()
        except KeyboardInterrupt:
            print("stopping", flush=True)
    return 0


def adapter_folders(folder: Path) -> Sequence[Path]:
    """The sub-folders, sorted by name. Raises FleetError when there are none to serve."""
    if not folder.is_dir():
        raise FleetError(f"the adapters folder {folder} {'is a file' if folder.exists() else 'does not exist'}")
    if (folder / "adapter_config.json").exists():
        raise FleetError(f"{folder} is an adapter itself: give the folder above, which holds one folder per adapter")
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise FleetError(f"{folder} has no sub-folders: it should hold one PEFT folder per adapter")
    return folders


def upload_all(gateway: str, folders: Sequence[Path]) -> list[Upload]:
    """Uploads each folder under its name. One that is refused does not stop the others.

    Raises Unavailable when the gateway is gone.
    """
    with Client(gateway) as client:
        return list(_uploads(client, folders))


def _uploads(client: Client, folders: Sequence[Path]) -> Iterator[Upload]:
    progress = ProgressLine()
    for index, folder in enumerate(folders, start=1):
        title = f"adapter {index} of {len(folders)}: {folder.name}"

        def show(sent_bytes: int, total_bytes: int, title: str = title) -> None:
            progress.show(f"{title} {sent_bytes / max(1, total_bytes):.0%}")

        try:
            result = client.adapters.push(folder.name, folder, replace=True, on_progress=show)
            yield Upload(folder.name, True, "; ".join(result.warnings))
        except Unavailable:
            raise
        except (LoraplexError, OSError) as error:
            yield Upload(folder.name, False, one_line(str(error)))
        finally:
            progress.clear()


def _print_tables(fleet: "Fleet", uploads: Sequence[Upload]) -> None:
    rows = [
        [service.name, service.address, service.metrics_address, service.log] for service in fleet.services.values()
    ]
    print(table(["SERVICE", "GRPC", "METRICS", "LOG"], rows))
    if uploads:
        states = [[upload.adapter_id, "loaded" if upload.loaded else "refused", upload.why] for upload in uploads]
        print(table(["ADAPTER", "STATE", "WHY"], states))


def _print_ready(fleet: "Fleet", uploads: Sequence[Upload]) -> None:
    print(f"ready gateway={fleet.gateway.address}")
    loaded = [upload.adapter_id for upload in uploads if upload.loaded]
    adapter = f" --adapter {loaded[0]}" if loaded else ""
    print(f'try it:   {program()} generate --gateway {fleet.gateway.address}{adapter} "Hello"')
    print("stop it:  Ctrl-C", flush=True)


def _fleet_options(arguments: argparse.Namespace) -> "FleetOptions":
    from loraplex.fleet import FleetOptions

    return FleetOptions(
        model=arguments.model,
        model_name=arguments.model_name,
        data_dir=arguments.data_dir or _default_data_dir(arguments.model),
        workers=arguments.workers,
        device=arguments.device,
        dtype=arguments.dtype,
        memory=arguments.memory,
        port=arguments.port,
        ready_timeout_seconds=arguments.ready_timeout,
    )


def _default_data_dir(model: Path) -> Path:
    """A folder of its own for each model: adapters of one do not fit another."""
    from loraplex.fleet import find_services

    path = model.resolve()
    return find_services() / ".loraplex" / f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{number} is not a port: 0 to 65535")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return number
