"""What the clients send: options to protobuf, folders to upload messages."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypedDict, cast

from google.protobuf.message import Message

from loraplex.errors import InvalidArgument
from loraplex.v1 import adapter_store_pb2, gateway_pb2, types_pb2

# One turn of a conversation: {"role": ..., "content": ...}; the role is `system`, `user` or `assistant`, as the model's
# template names them.
ChatMessage = Mapping[str, str]
# Text, token ids, or a conversation.
Prompt = str | Sequence[int] | Sequence[ChatMessage]
# Called with (bytes sent so far, bytes in all).
ProgressCallback = Callable[[int, int], None]

UPLOAD_CHUNK_BYTES = 1024 * 1024

UPLOAD_FILES = (
    ("adapter_config.json", adapter_store_pb2.ADAPTER_FILE_CONFIG),
    ("adapter_model.safetensors", adapter_store_pb2.ADAPTER_FILE_WEIGHTS),
    ("chat_template.jinja", adapter_store_pb2.ADAPTER_FILE_CHAT_TEMPLATE),
)
_OPTIONAL_FILES = frozenset({"chat_template.jinja"})


class GenerateOptions(TypedDict, total=False):
    """Options of a generation; what is left out has the default in brackets. Out of range is InvalidArgument."""

    adapter_version: str  # digest of the version to use [what the id points to now]
    temperature: float  # 0 to 10, 0 is greedy [1.0]
    top_p: float  # above 0 up to 1 [1.0, off]
    top_k: int  # 0 (off) up to the vocabulary size [0]
    min_p: float  # 0 (off) to 1, relative to the most likely token [0]
    seed: int  # of the draw [drawn by the gateway, returned in the answer]
    presence_penalty: float  # -2 to 2 [0]
    frequency_penalty: float  # -2 to 2 [0]
    repetition_penalty: float  # above 0 up to 10 [1.0, off]
    logit_bias: Mapping[int, float]  # token id to -100 to 100, at most 1,024
    max_tokens: int  # 1 up to the context [128]
    min_tokens: int  # nothing ends the output before [0]
    stop: Sequence[str]  # at most 16 strings of at most 256 characters
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop: bool  # keeps the matched stop string in the text
    n: int  # outputs of the same prompt, 1 to 16 [1]
    logprobs: int  # alternatives per generated token, at most 20; 0 means the chosen token alone [no log-probabilities]
    prompt_logprobs: int  # the same for the tokens of the prompt
    return_token_ids: bool
    echo: bool  # puts the prompt in front of the text
    priority: int  # higher goes first within the tenant [0]
    ttft_slo_seconds: float  # target for the first token


_GROUPS = ("sampling", "stopping", "output", "scheduling")


def generate_request(prompt: Prompt, adapter: str, options: GenerateOptions) -> gateway_pb2.GenerateRequest:
    """The message of one generation. Raises InvalidArgument for an option that does not exist or does not fit."""
    request = gateway_pb2.GenerateRequest(adapter_id=adapter)
    _set_prompt(request, prompt)
    for name, value in options.items():
        try:
            _set(_group_of(request, name), name, value)
        except (AttributeError, TypeError, ValueError) as error:
            raise InvalidArgument("BAD_OPTION", f"{name}={value!r}: {error}") from None
    return request


def tokenize_request(prompt: str | Sequence[ChatMessage], adapter: str) -> gateway_pb2.TokenizeRequest:
    """Raises InvalidArgument for a prompt of another kind."""
    request = gateway_pb2.TokenizeRequest(adapter_id=adapter)
    _set_prompt(request, prompt)
    return request


def _set_prompt(request: Any, prompt: Prompt) -> None:
    try:
        if isinstance(prompt, str):
            request.text = prompt
        elif len(prompt) > 0 and all(isinstance(message, Mapping) for message in prompt):
            request.chat.CopyFrom(types_pb2.ChatPrompt(messages=cast("Sequence[Any]", prompt)))
        else:
            request.token_ids.CopyFrom(types_pb2.TokenIds(ids=cast("Sequence[int]", prompt)))
    except (AttributeError, TypeError, ValueError) as error:
        message = f"a prompt is text, a list of token ids, or a list of messages with role and content: {error}"
        raise InvalidArgument("BAD_PROMPT", message) from None


def _group_of(request: gateway_pb2.GenerateRequest, name: str) -> Message:
    """The message that has the option as a field."""
    if name not in GenerateOptions.__annotations__:
        raise TypeError(f"no such option; there are {', '.join(GenerateOptions.__annotations__)}")
    groups: list[Message] = [getattr(request, group) for group in _GROUPS]
    return next((group for group in groups if name in group.DESCRIPTOR.fields_by_name), request)


def _set(message: Message, name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        getattr(message, name).update(value)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        getattr(message, name).extend(value)
    else:
        setattr(message, name, value)


def _open(path: Path) -> BinaryIO:
    return path.open("rb")


class Upload:
    """The messages of one upload: a header, then each file in chunks of at most 1 MiB.

    Raises InvalidArgument when the folder lacks a file of a PEFT adapter.
    """

    def __init__(
        self,
        adapter_id: str,
        folder: Path,
        *,
        replace: bool = False,
        expected_version: str = "",
        on_progress: ProgressCallback | None = None,
        open_file: Callable[[Path], BinaryIO] = _open,
    ) -> None:
        """`open_file` opens each of the files, once."""
        self._header = adapter_store_pb2.UploadHeader(
            adapter_id=adapter_id, replace=replace, expected_version=expected_version
        )
        self._files = [(folder / name, kind) for name, kind in UPLOAD_FILES if _wanted(folder, name)]
        self._total_bytes = sum(path.stat().st_size for path, _ in self._files)
        self._on_progress = on_progress
        self._open_file = open_file

    def messages(self) -> Iterator[adapter_store_pb2.UploadAdapterRequest]:
        yield adapter_store_pb2.UploadAdapterRequest(header=self._header)
        sent_bytes = 0
        for path, kind in self._files:
            with self._open_file(path) as file:
                while data := file.read(UPLOAD_CHUNK_BYTES):
                    chunk = adapter_store_pb2.UploadChunk(file=kind, data=data)
                    yield adapter_store_pb2.UploadAdapterRequest(chunk=chunk)
                    sent_bytes += len(data)
                    if self._on_progress:
                        self._on_progress(sent_bytes, self._total_bytes)


def _wanted(folder: Path, name: str) -> bool:
    if (folder / name).is_file():
        return True
    if name in _OPTIONAL_FILES:
        return False
    if not folder.is_dir():
        raise InvalidArgument("ADAPTER_FOLDER_MISSING", f"{folder} is not a folder")
    message = f"{folder} has no {name}"
    if name.endswith(".safetensors") and (folder / "adapter_model.bin").exists():
        message += "; adapter_model.bin is not accepted, save the adapter as safetensors"
    raise InvalidArgument("ADAPTER_FILE_MISSING", message)
