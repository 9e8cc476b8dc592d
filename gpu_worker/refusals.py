"""Remembers for a short while what was not fetched and why, so that asking again costs nothing."""

from common.errors import LoraplexError, Unavailable

# Long enough to spare the store a crowd's questions, short enough that a mended adapter is not waited for.
BAD_SECONDS = 5.0
AWAY_SECONDS = 1.0
MAX_REMEMBERED = 4096

_Known = tuple[LoraplexError, float]


class Refusals:
    """Bad adapters one by one; a store that is away for all of them. Times are those of the caller's clock."""

    def __init__(self) -> None:
        # (tenant, version) -> error and when it is forgotten, in order of the latter
        self._bad: dict[tuple[str, str], _Known] = {}
        self._away: _Known | None = None

    def __len__(self) -> int:
        return len(self._bad)

    def find(self, tenant: str, adapter_version: str, now: float) -> LoraplexError | None:
        """What is remembered about the adapter or the store, with the seconds until it is forgotten."""
        for known in (self._away, self._bad.get((tenant, adapter_version))):
            if known is not None and now < known[1]:
                return _again(known[0], known[1] - now)
        return None

    def note(self, tenant: str, adapter_version: str, error: LoraplexError, now: float) -> None:
        """Remembers an error: UNAVAILABLE is the store's, any other the adapter's."""
        if isinstance(error, Unavailable):
            self._away = (error, now + AWAY_SECONDS)
            return
        self._bad.pop((tenant, adapter_version), None)
        self._bad[tenant, adapter_version] = (error, now + BAD_SECONDS)
        while len(self._bad) > MAX_REMEMBERED or next(iter(self._bad.values()))[1] <= now:
            del self._bad[next(iter(self._bad))]


def _again(error: LoraplexError, seconds: float) -> LoraplexError:
    message = f"{error.message} (found before; the worker tries again in {seconds:.1f} s)"
    return type(error)(
        error.reason, message, metadata=error.metadata, field=error.field, retry_after_seconds=round(seconds, 3)
    )
