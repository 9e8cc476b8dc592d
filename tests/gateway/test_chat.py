"""Conversations to prompts, as transformers renders them, and templates that fail or never end."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from common.base_model import tokenizer_files
from common.errors import FailedPrecondition, InvalidArgument
from gateway.chat import ChatTemplates
from gateway.prompts import PromptSpec, read_prompt
from gateway.tokenization import TextTokenizer
from loraplex.v1 import types_pb2
from tests.gateway.chat_templates import QWEN_2, TEMPLATES
from tests.gateway.fakes import byte_tokenizer, byte_tokenizer_files, token_ids

CONVERSATIONS = {
    "one question": [("user", "What is 2 + 2?")],
    "with a system message": [("system", " Be brief.\n"), ("user", "Grüße, 東京 <b>&</b>")],
    "three turns": [("user", "Hi"), ("assistant", "<think>\nhm\n</think>\n\nHello "), ("user", " Again?\n")],
    "odd words": [("user", "{{ 7 * 7 }} {% raw %} </s> \\n \"'"), ("assistant", ""), ("user", "\u2028")],
}
HELLO = [types_pb2.ChatMessage(role="user", content="hello")]


def messages_of(turns: list[tuple[str, str]]) -> list[types_pb2.ChatMessage]:
    return [types_pb2.ChatMessage(role=role, content=content) for role, content in turns]


def saved(template: str, folder: Path) -> PreTrainedTokenizerFast:
    """A checkpoint's tokenizer in `folder`, as transformers writes it."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
async def test_a_conversation_becomes_the_ids_of_transformers(
    template: str, turns: list[tuple[str, str]], tmp_path: Path
) -> None:
    theirs = saved(template, tmp_path)
    ours = TextTokenizer(tokenizer_files(tmp_path))
    conversation = [{"role": role, "content": content} for role, content in turns]
    expected = theirs.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    prompt = await read_prompt(PromptSpec(chat=tuple(messages_of(turns))), ours)
    assert prompt.text == theirs.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    assert prompt.token_ids == expected


async def test_special_tokens_are_not_added_twice() -> None:
    tokenizer = TextTokenizer(byte_tokenizer_files())
    prompt = await read_prompt(PromptSpec(chat=tuple(HELLO)), tokenizer, "<s>{{ messages[0].content }}")
    assert prompt.token_ids == [1, *token_ids("hello")]


async def test_a_template_of_the_adapter_wins() -> None:
    chat = ChatTemplates("theirs", {})
    assert await chat.render(HELLO, "mine: {{ messages[0].content }}") == "mine: hello"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param({"chat_template": "plain"}, "plain", id="a string"),
        pytest.param(
            {"chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": "named"}]},
            "named",
            id="a list of named ones",
        ),
        pytest.param({"chat_template": "{{ bos_token }}", "bos_token": "<s>"}, "<s>", id="a token"),
        pytest.param(
            {"chat_template": "{{ bos_token }}", "bos_token": {"content": "<s>", "special": True}},
            "<s>",
            id="a token as an object",
        ),
        pytest.param({"chat_template": "[{{ unk_token }}]", "unk_token": None}, "[]", id="no token"),
    ],
)
async def test_the_template_of_the_configuration(config: dict[str, object], expected: str) -> None:
    chat = ChatTemplates.of_files({"tokenizer_config.json": json.dumps(config).encode()})
    assert await chat.render(HELLO) == expected


async def test_a_file_of_its_own_comes_before_the_configuration() -> None:
    config = json.dumps({"chat_template": "old"}).encode()
    chat = ChatTemplates.of_files({"tokenizer_config.json": config, "chat_template.jinja": b"new"})
    assert await chat.render(HELLO) == "new"


async def test_special_tokens_may_be_in_a_file_of_their_own() -> None:
    files = {"special_tokens_map.json": b'{"bos_token": "<s>"}', "chat_template.jinja": b"{{ bos_token }}"}
    assert await ChatTemplates.of_files(files).render(HELLO) == "<s>"


async def test_without_a_template_a_conversation_is_refused() -> None:
    with pytest.raises(FailedPrecondition) as caught:
        await ChatTemplates.of_files(byte_tokenizer_files()).render(HELLO)
    assert caught.value.reason == "NO_CHAT_TEMPLATE"


@pytest.mark.parametrize(
    "files",
    [
        pytest.param({"tokenizer_config.json": b"{"}, id="no JSON"),
        pytest.param({"tokenizer_config.json": b"[]"}, id="no object"),
        pytest.param({"chat_template.jinja": b"\xff"}, id="no text"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(files: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match=next(iter(files))):
        ChatTemplates.of_files(files)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        pytest.param("{{ raise_exception('roles must alternate') }}", "roles must alternate", id="its own words"),
        pytest.param("{% if %}", "Expected an expression", id="syntax"),
        pytest.param("{{ messages[0].nothing.at_all }}", "has no attribute 'nothing'", id="undefined"),
        pytest.param("{{ 1 / 0 }}", "it fails with ZeroDivisionError", id="arithmetic"),
        pytest.param("{{ messages.__class__.__mro__ }}", "is unsafe", id="a way out of the sandbox"),
        pytest.param("{{ messages.append(1) }}", "is unsafe", id="a change of the conversation"),
        pytest.param("{% set n = namespace(_x=1) %}", "underscore", id="a hidden name"),
        pytest.param("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError", id="endless recursion"),
        pytest.param("{{ 'a' * 10 ** 10 }}", "more than 8388608 characters", id="a product"),
        pytest.param("{{ 9 ** 99 }}", "a power in it is too large", id="a power"),
        pytest.param(
            "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "more than 8388608 characters", id="long output"
        ),
        pytest.param(
            "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "more than 8388608 characters",
            id="doubling",
        ),
        pytest.param(
            "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "more than 8388608 characters",
            id="a growing list",
        ),
    ],
)
async def test_a_template_that_fails_is_the_requests_error(template: str, problem: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await ChatTemplates(template, {}).render(HELLO)
    assert caught.value.reason == "CHAT_TEMPLATE_FAILED"
    assert caught.value.message.startswith("the chat template does not take this conversation: ")
    assert problem in caught.value.message


async def test_a_template_that_never_ends_is_cut_off() -> None:
    loops = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    with pytest.raises(InvalidArgument, match="it takes too long"):
        await ChatTemplates(loops, {}, max_seconds=0.05).render(HELLO)


async def test_a_conversation_is_data_and_no_template() -> None:
    messages = messages_of([("user", "{{ bos_token }}{% if x %}")])
    assert "{{ bos_token }}{% if x %}" in await ChatTemplates(QWEN_2, {"bos_token": "<s>"}).render(messages)


def test_the_oracle_has_the_same_tokenizer(tmp_path: Path) -> None:
    saved("", tmp_path)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab() == byte_tokenizer().get_vocab()
