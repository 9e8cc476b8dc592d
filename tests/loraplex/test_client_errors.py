"""The table from gRPC status to exception is complete, and the tree in the docstring is true."""

import re

import grpc
import pytest
from google.rpc import code_pb2

import loraplex.errors
from loraplex import Client, LoraplexError
from loraplex.errors import BY_CODE, Internal
from tests.loraplex import fakes
from tests.loraplex.fakes import FakeGateway

# A success, and three that our services never answer on purpose.
WITHOUT_CLASS = {"OK", "UNKNOWN", "OUT_OF_RANGE"}


def test_every_status_has_an_exception() -> None:
    assert {code.name for code in grpc.StatusCode} - {code.name for code in BY_CODE} == WITHOUT_CLASS


def test_the_drawn_tree_names_every_exception() -> None:
    drawn = set(re.findall(r"[├└]── (\w+)", loraplex.errors.__doc__ or ""))
    assert drawn == {error.__name__ for error in LoraplexError.__subclasses__()}


@pytest.mark.parametrize("code", BY_CODE, ids=lambda code: code.name)
def test_a_status_becomes_its_exception(code: grpc.StatusCode, gateway: FakeGateway, address: str) -> None:
    gateway.failure = fakes.status(code.value[0], "A_REASON", "a sentence")
    with Client(address) as client, pytest.raises(BY_CODE[code], match="A_REASON: a sentence"):
        client.generate("x")


def test_a_status_outside_the_table_is_internal(gateway: FakeGateway, address: str) -> None:
    gateway.failure = fakes.status(code_pb2.OUT_OF_RANGE, "ODD", "a sentence")
    with Client(address) as client, pytest.raises(Internal):
        client.generate("x")


def test_a_failure_without_details_has_the_name_of_its_status(address: str) -> None:
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/loraplex.v1.GatewayService/Nothing", bytes, bytes)(b"")
    error = loraplex.errors.from_rpc_error(caught.value, address=address)
    assert (error.reason, error.retry_after_seconds) == ("UNIMPLEMENTED", None)
