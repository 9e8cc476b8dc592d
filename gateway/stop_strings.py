"""Stop strings in a text that arrives in pieces."""

from collections.abc import Sequence


class _Progress:
    """How much of one stop string the end of the text is (Knuth, Morris and Pratt)."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        # The longest prefix of `stop` that the text ends with.
        self.length = 0
        self._shorter = _borders(stop)

    @property
    def whole(self) -> bool:
        return self.length == len(self.stop)

    @property
    def pending(self) -> int:
        """Characters at the end of the text that may become this stop string."""
        return self._shorter[self.length] if self.whole else self.length

    def advance(self, character: str) -> None:
        length = self.length
        while length and (length == len(self.stop) or self.stop[length] != character):
            length = self._shorter[length]
        self.length = length + (self.stop[length] == character)


def _borders(stop: str) -> list[int]:
    """For each length of a prefix: the longest shorter prefix that is also its end."""
    borders, border = [0, 0], 0
    for character in stop[1:]:
        while border and stop[border] != character:
            border = borders[border]
        border += stop[border] == character
        borders.append(border)
    return borders


class StopMatcher:
    """Lets text pass until a stop string is whole, holding back what may become one.

    The stop string that ends first wins, and of those that end at the same character the longest, so that the result
    does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool) -> None:
        self._progress = [_Progress(stop) for stop in stops]
        self._include_stop = include_stop
        self._held = ""
        # The stop string that ended the text.
        self.matched: str | None = None

    def push(self, text: str, *, honoured: bool = True) -> str:
        """The text that can be shown. A stop string that becomes whole while not `honoured` is text like any other."""
        if not self._progress:
            return text
        for position, character in enumerate(text):
            for progress in self._progress:
                progress.advance(character)
            if honoured and (found := [progress.stop for progress in self._progress if progress.whole]):
                return self._end(self._held + text[: position + 1], max(found, key=len))
        return self._release(self._held + text)

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _end(self, text: str, stop: str) -> str:
        self.matched, self._held = stop, ""
        return text if self._include_stop else text[: -len(stop)]

    def _release(self, text: str) -> str:
        # A whole one was not honoured: only its end can be the start of another.
        held = max(progress.pending for progress in self._progress)
        whole = len(text) - held
        self._held = text[whole:]
        return text[:whole]
