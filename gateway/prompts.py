"""Prompts to token ids."""

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.tokenization import TextTokenizer
from loraplex.v1 import types_pb2


@dataclass(frozen=True, slots=True)
class PromptSpec:
    """What a client sent: exactly one of the three is set."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    chat: tuple[types_pb2.ChatMessage, ...] | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads."""

    token_ids: list[int]
    # As far as it was text; None when the client sent token ids.
    text: str | None
    # The output goes on where the prompt ends; the answer in a conversation is a text of its own.
    continued: bool


async def read_prompt(spec: PromptSpec, tokenizer: TextTokenizer, chat_template: str = "") -> Prompt:
    """Renders and tokenises. `chat_template` takes the place of the checkpoint's own unless it is empty.

    Raises InvalidArgument or FailedPrecondition when the template cannot render the conversation.
    """
    if spec.chat is not None:
        text = await tokenizer.chat_templates.render(spec.chat, chat_template)
        # The template writes the special tokens itself.
        ids = await tokenizer.encode(text, add_special_tokens=False)
        return Prompt(ids, text, continued=False)
    if spec.text is not None:
        return Prompt(await tokenizer.encode(spec.text), spec.text, continued=True)
    return Prompt(list(spec.token_ids or ()), None, continued=True)


def echo_of(prompt: Prompt, tokenizer: TextTokenizer) -> str:
    """The text that goes in front of an answer."""
    return tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text


def context_of(prompt: Prompt) -> Sequence[int]:
    """The tokens that the text of an answer continues."""
    return prompt.token_ids if prompt.continued else ()
