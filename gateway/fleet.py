"""What the attached workers serve: one model, one tokenizer."""

from common.version import PROTOCOL_VERSION
from gateway.link import IncompatiblePeer
from gateway.tokenization import TextTokenizer
from gateway.validation import ModelLimits
from loraplex.v1 import types_pb2, worker_pb2


class Fleet:
    """The model identity every attached worker has, and the tokenizer that belongs to it."""

    def __init__(self, tokenizer: TextTokenizer | None = None) -> None:
        """`tokenizer` is the operator's own; workers with another one are refused."""
        self.model: types_pb2.ModelIdentity | None = None
        self.tokenizer = tokenizer
        self._pinned = tokenizer is not None

    @property
    def tokenizer_digest(self) -> str:
        """Empty while there is no tokenizer."""
        return "" if self.tokenizer is None else self.tokenizer.digest

    @property
    def limits(self) -> ModelLimits:
        """Of the current model; a worker must have joined."""
        assert self.model is not None
        geometry = self.model.geometry
        return ModelLimits(geometry.vocab_size, geometry.max_context_tokens)

    def join(self, welcome: worker_pb2.AttachWelcome, *, alone: bool) -> None:
        """Takes in a worker. `alone` says that no other is attached, so that it may bring a new model.

        Raises IncompatiblePeer naming what differs.
        """
        model = welcome.model
        if model.protocol_version != PROTOCOL_VERSION:
            raise _differs("protocol version", model.protocol_version, PROTOCOL_VERSION)
        if self.model is not None and not alone:
            _check_same(model, self.model)
        if model.tokenizer_digest != self.tokenizer_digest:
            if self._pinned:
                raise _differs("tokenizer digest", model.tokenizer_digest, self.tokenizer_digest)
            self.tokenizer = _tokenizer_of(welcome)
        self.model = model


def _check_same(model: types_pb2.ModelIdentity, expected: types_pb2.ModelIdentity) -> None:
    if model.base_fingerprint != expected.base_fingerprint:
        raise _differs("base fingerprint", model.base_fingerprint, expected.base_fingerprint)
    if model.tokenizer_digest != expected.tokenizer_digest:
        raise _differs("tokenizer digest", model.tokenizer_digest, expected.tokenizer_digest)
    if model.geometry != expected.geometry:
        raise _differs("geometry", model.geometry, expected.geometry)


def _tokenizer_of(welcome: worker_pb2.AttachWelcome) -> TextTokenizer:
    try:
        tokenizer = TextTokenizer({file.name: file.content for file in welcome.tokenizer_files})
    except ValueError as error:
        raise IncompatiblePeer(str(error)) from None
    if tokenizer.digest != welcome.model.tokenizer_digest:
        raise _differs("digest of its tokenizer files", tokenizer.digest, welcome.model.tokenizer_digest)
    return tokenizer


def _differs(what: str, theirs: object, ours: object) -> IncompatiblePeer:
    return IncompatiblePeer(f"its {what} is {theirs}, expected {ours}")
