"""Clients that are not ours: `buf curl` through reflection, and Node. Run from the checkout: `make test-clients`.

Starts the demo model, asks one of its adapters through each client, checks the answers, and stops everything.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from examples.demo_model.words import prompt_for, reverse
from loraplex import Client, LoraplexError
from loraplex.fleet import Fleet, FleetOptions
from loraplex.process import FleetError

EXAMPLES = Path(__file__).resolve().parent
ADAPTER = "reverse"
WORD = "nvdjqif"
CALL_SECONDS = 200.0


def answer_of_buf(buf: str, gateway: str) -> str:
    """One JSON message for each of the stream; buf learns the schema from the gateway's reflection."""
    request = {
        "adapterId": ADAPTER,
        "text": prompt_for(WORD),
        "sampling": {"temperature": 0},
        "stopping": {"maxTokens": 32},
    }
    url = f"http://{gateway}/loraplex.v1.GatewayService/GenerateStream"
    shown = _run(buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--data", json.dumps(request), url)
    return "".join(output.get("text", "") for message in _messages(shown) for output in message.get("outputs", ()))


def answer_of_node(gateway: str) -> str:
    """The first line of the example; the second says how many tokens."""
    shown = _run("node", str(EXAMPLES / "node" / "generate.js"), gateway, ADAPTER, prompt_for(WORD))
    return shown.splitlines()[0]


def refusal_of_node(gateway: str) -> str:
    command = ["node", str(EXAMPLES / "node" / "generate.js"), gateway, "nobody", "x"]
    return subprocess.run(command, capture_output=True, text=True, timeout=CALL_SECONDS).stderr.strip()


def problems(buf: str, gateway: str) -> Iterator[str]:
    """A sentence for each client that got something else than the skill's answer."""
    clients: dict[str, Callable[[], str]] = {
        "buf curl": lambda: answer_of_buf(buf, gateway),
        "node": lambda: answer_of_node(gateway),
    }
    for name, ask in clients.items():
        answer = ask()
        print(f"{name}: {prompt_for(WORD)}{answer}", flush=True)
        if answer != reverse(WORD):
            yield f"{name} got {answer!r}, not {reverse(WORD)!r}"
    refusal = refusal_of_node(gateway)
    print(f"node, for an adapter that is not there: {refusal}", flush=True)
    if not refusal.startswith("refused: NOT_FOUND: "):
        yield f"node was told {refusal!r} for an adapter that is not there"


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=CALL_SECONDS)
    if done.returncode:
        raise FleetError(f"{' '.join(command[:2])} failed with code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _messages(text: str) -> Iterator[dict[str, list[dict[str, str]]]]:
    """JSON objects one after the other."""
    decoder, position = json.JSONDecoder(), 0
    while position < len(text.rstrip()):
        message, position = decoder.raw_decode(text, position + len(text[position:]) - len(text[position:].lstrip()))
        yield message


def main(buf: str) -> int:
    demo = EXAMPLES / "demo_model"
    with tempfile.TemporaryDirectory(prefix="loraplex-clients-") as data:
        try:
            with Fleet(FleetOptions(model=demo / "base", data_dir=Path(data))) as fleet:
                with Client(fleet.gateway.address) as client:
                    client.adapters.push(ADAPTER, demo / "adapters" / ADAPTER)
                found = list(problems(buf, fleet.gateway.address))
        except (FleetError, LoraplexError, OSError, subprocess.TimeoutExpired) as error:
            found = [str(error)]
    for problem in found:
        print(f"clients failed: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m examples.other_clients BUF")
    raise SystemExit(main(sys.argv[1]))
