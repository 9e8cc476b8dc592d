"""docs/api.md against the tree: every reason an error can have, every rpc, every option and every limit is there."""

import ast
import re
from collections.abc import Iterator

import pytest

from adapter_store.peft_config import REFUSED_SETTINGS
from gateway import chat, validation
from loraplex.calls import CHANNEL_OPTIONS
from loraplex.errors import BY_CODE
from loraplex.v1 import adapter_store_pb2, gateway_pb2, types_pb2
from tests.checkout import read, tree_files

DOC = read("docs/api.md")
PACKAGES = ("adapter_store", "common", "gateway", "gpu_worker", "loraplex", "scheduler")
# Names of environment variables look like reasons and are none; a single letter is a type code.
REASON = re.compile(r"(?!LORAPLEX_|GRPC_)[A-Z][A-Z0-9]+(_[A-Z0-9]+)*")
# Made of the name of a peer, of a quota or of a refused setting.
COMPOSED = {"ADAPTER_STORE_UNAVAILABLE", "SCHEDULER_UNAVAILABLE", "QUOTA_ADAPTERS", "QUOTA_BYTES"}
COMPOSED |= {f"{setting.upper()}_UNSUPPORTED" for setting in REFUSED_SETTINGS}


def reason_of(arguments: list[ast.expr]) -> str | None:
    """UPPER_SNAKE in front of a sentence; the scheduler's refusals have a status in front of both."""
    texts = [argument.value for argument in arguments[:2] if isinstance(argument, ast.Constant)]
    reasons = [text for text in texts if isinstance(text, str) and REASON.fullmatch(text)]
    first = arguments and isinstance(arguments[0], ast.Constant) and arguments[0].value in reasons
    return reasons[-1] if first and len(arguments) > len(reasons) else None


def reasons_in(source: str) -> Iterator[str]:
    """Of every call and every returned pair, and what is given as `reason`."""
    for node in ast.walk(ast.parse(source)):
        found = None
        if isinstance(node, ast.Call):
            found = reason_of(node.args)
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
            found = reason_of(node.value.elts)
        elif isinstance(node, ast.keyword) and node.arg == "reason":
            found = reason_of([node.value, ast.Name("message")])
        if found is not None:
            yield found


def reasons_of_the_tree() -> set[str]:
    files = [path for package in PACKAGES for path in tree_files(package) if path.suffix == ".py"]
    return {reason for path in files for reason in reasons_in(read(path))} | COMPOSED


def documented_reasons() -> set[str]:
    """The first column of the tables below the catalogue's headline."""
    catalogue = DOC.split("## Errors")[1].split("\n## ")[0]
    return set(re.findall(r"(?m)^\| `([A-Z_]+)` \|", catalogue))


def test_every_reason_in_the_code_is_in_the_catalogue() -> None:
    assert sorted(reasons_of_the_tree() - documented_reasons()) == []


def test_every_reason_in_the_catalogue_is_in_the_code() -> None:
    source = "".join(read(path) for package in PACKAGES for path in tree_files(package) if path.suffix == ".py")
    written = {reason for reason in documented_reasons() if f'"{reason}"' in source}
    assert sorted(documented_reasons() - written - COMPOSED) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('raise NotFound("NO_SUCH", f"{x}")', ["NO_SUCH"]),
        ('return "DRAINING", "it stops"', ["DRAINING"]),
        ('_invalid("x", "y", reason="EMPTY")', ["EMPTY"]),
        ('Refusal("UNAVAILABLE", "QUEUE_FULL", "it is full")', ["QUEUE_FULL"]),
        ('os.environ["HOME"]; print("LOUD")', []),
    ],
)
def test_a_reason_is_found(source: str, found: list[str]) -> None:
    indented = source if source.startswith(("raise", "_", "R", "os")) else f"def f():\n    {source}"
    assert list(reasons_in(indented)) == found


@pytest.mark.parametrize("status", BY_CODE, ids=lambda code: code.name)
def test_every_status_is_explained(status: object) -> None:
    assert f"`{getattr(status, 'name', '')}`" in DOC


def methods() -> list[str]:
    services = (
        gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"],
        adapter_store_pb2.DESCRIPTOR.services_by_name["AdapterStoreService"],
    )
    return [method.name for service in services for method in service.methods]


@pytest.mark.parametrize("method", methods())
def test_every_rpc_is_there(method: str) -> None:
    assert f"`{method}`" in DOC


def fields() -> list[str]:
    messages = (
        gateway_pb2.GenerateRequest,
        gateway_pb2.GenerateResponse,
        gateway_pb2.Output,
        types_pb2.SamplingParams,
        types_pb2.StoppingParams,
        types_pb2.OutputParams,
        types_pb2.SchedulingParams,
        types_pb2.Usage,
    )
    return sorted({field.name for message in messages for field in message.DESCRIPTOR.fields})


@pytest.mark.parametrize("field", fields())
def test_every_field_is_there(field: str) -> None:
    assert re.search(rf"`(\w+\.)?{field}`", DOC)


@pytest.mark.parametrize(
    "limit",
    [
        validation.MAX_STOP_STRINGS,
        validation.MAX_STOP_CHARACTERS,
        validation.MAX_LOGPROBS,
        validation.MAX_LOGIT_BIAS_ENTRIES,
        validation.MAX_OUTPUTS,
        validation.MAX_CHAT_MESSAGES,
        validation.MAX_ROLE_CHARACTERS,
        validation.DEFAULT_MAX_TOKENS,
        chat.MAX_RENDERED_CHARACTERS,
    ],
)
def test_every_limit_is_there(limit: int) -> None:
    assert re.search(rf"\b{limit:,}\b", DOC)


def test_the_keepalive_of_the_client_is_there() -> None:
    options = dict(CHANNEL_OPTIONS)
    for name in ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.max_pings_without_data"):
        assert re.search(rf"`{re.escape(name)}` \| {options[name]:,} \|", DOC)
