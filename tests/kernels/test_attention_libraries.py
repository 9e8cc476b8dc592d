"""Which library attention goes to, and what is said of one that is there and not used."""

from collections.abc import Iterator

import pytest
import torch

from kernels import dispatch
from kernels.gpu import tiles
from kernels.paged_attention import flash_attn, flashinfer, libraries
from kernels.paged_attention.libraries import HostIndices, refusals
from tests.kernels.libraries import install

BOTH = ("flash_attn", "flashinfer")
INT = torch.zeros(1, dtype=torch.int32)
HOST = HostIndices(INT[None], INT, INT)


@pytest.fixture
def deterministic() -> Iterator[None]:
    tiles.set_deterministic(True)
    yield
    tiles.set_deterministic(False)


def chosen(
    *, page_size: int = 256, has_host: bool = True, decode_only: bool = False, dtype: torch.dtype = torch.half
) -> str:
    query, pages = torch.zeros(2, 4, 64, dtype=dtype), torch.zeros(1, 1, 2, page_size, 2, 64, dtype=dtype)
    attend = libraries.choose(query, pages, HOST if has_host else None, decode_only=decode_only)
    names = {
        None: "",
        flash_attn.paged_attention_flash_attn: "flash_attn",
        flashinfer.paged_attention_flashinfer: "flashinfer",
    }
    return names[attend]


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BOTH:
        install(monkeypatch, name)


@pytest.mark.usefixtures("both")
def test_pages_of_256_tokens_are_for_flash_attention_and_others_for_flashinfer() -> None:
    assert chosen() == "flash_attn"
    assert chosen(page_size=16) == "flashinfer"
    assert chosen(dtype=torch.float32) == ""


@pytest.mark.usefixtures("both")
def test_decodes_in_a_graph_go_to_flash_attention_or_to_triton() -> None:
    assert chosen(decode_only=True, has_host=False) == "flash_attn"
    assert chosen(decode_only=True, page_size=16) == ""


@pytest.mark.usefixtures("both")
def test_prompts_without_indices_on_the_host_are_for_nobody() -> None:
    assert chosen(has_host=False) == ""
    assert chosen(has_host=False, page_size=16) == ""


def test_nothing_that_is_not_installed() -> None:
    assert chosen() == ""
    assert list(refusals(torch.half, 16, 64)) == []


@pytest.mark.usefixtures("both", "deterministic")
def test_deterministic_takes_none_and_says_so() -> None:
    assert chosen() == chosen(page_size=16) == ""
    assert [sentence.split()[0] for sentence in refusals(torch.half, 256, 64)] == list(BOTH)


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_a_forced_backend_leaves_them_out(backend: str) -> None:
    with dispatch.force(backend):
        assert chosen() == chosen(page_size=16) == ""


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize(("named", "wanted"), [("flashinfer", "flashinfer"), ("triton", ""), ("", "flash_attn")])
def test_one_can_be_named(named: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_attention", named)
    assert chosen() == wanted


@pytest.mark.usefixtures("both")
def test_what_is_there_and_not_used_is_said_once_at_the_start() -> None:
    assert list(refusals(torch.half, 16, 64)) == [flash_attn.refusal(torch.half, 16, 64)]
    assert len(list(refusals(torch.float32, 256, 64))) == 2
    assert list(refusals(torch.half, 256, 64)) == []


@pytest.mark.usefixtures("both")
def test_a_named_library_that_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_attention", "flash_attn")
    with pytest.raises(ValueError, match="is 'flash_attn': flash_attn takes pages of a multiple of 256"):
        list(refusals(torch.half, 16, 64))
    assert list(refusals(torch.half, 256, 64)) == []


def test_a_named_library_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_attention", "flashinfer")
    with pytest.raises(ValueError, match="and flashinfer is not installed"):
        list(refusals(torch.half, 256, 64))


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="known: triton, flash_attn, flashinfer"):
        dispatch._checked_attention("cudnn")
