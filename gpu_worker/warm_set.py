"""Which adapters are hot, in a file that a restarted worker finds again."""

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

_log = logging.getLogger(__name__)

FILE_NAME = "warm-set.json"
HALF_LIFE_SECONDS = 300.0
# A restart brings back what is really hot; the long tail comes as it is asked for.
MAX_ADAPTERS = 256
# Demand below this share of a request is forgotten.
_FORGOTTEN = 1e-3


class WarmSet:
    """Demand by adapter, halving every five minutes. Read once at the start, written by atomic rename."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = folder / FILE_NAME
        self._clock = clock
        # (tenant, adapter version) -> requests, and when they were counted
        self._demand: dict[tuple[str, str], tuple[float, float]] = {}
        self._changed = False

    def note(self, tenant: str, adapter_version: str) -> None:
        """A request wants the adapter."""
        now = self._clock()
        self._demand[tenant, adapter_version] = (self._now(tenant, adapter_version, now) + 1.0, now)
        self._changed = True

    def hottest(self) -> list[tuple[str, str]]:
        """(tenant, adapter version), the hottest first."""
        now = self._clock()
        demand = {key: self._now(*key, now) for key in self._demand}
        self._demand = {key: (value, now) for key, value in demand.items() if value >= _FORGOTTEN}
        return sorted(self._demand, key=lambda key: -demand[key])[:MAX_ADAPTERS]

    def write(self) -> None:
        """Saves the hottest if anything was asked for since the last time; a full disk costs the file and no more."""
        if not self._changed:
            return
        self._changed = False
        adapters = [{"tenant": tenant, "adapter_version": version} for tenant, version in self.hottest()]
        partial = self._path.with_suffix(".new")
        try:
            partial.write_text(json.dumps({"adapters": adapters}), encoding="utf-8")
            os.replace(partial, self._path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            _log.warning("the warm set was not written: %s", error.strerror)

    def read(self) -> list[tuple[str, str]]:
        """What an earlier life wrote, the hottest first; nothing when that cannot be understood."""
        try:
            adapters = json.loads(self._path.read_text(encoding="utf-8"))["adapters"]
            found = [(str(adapter["tenant"]), str(adapter["adapter_version"])) for adapter in adapters]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError):
            _log.warning("the warm set of an earlier life cannot be read")
            return []
        return found[:MAX_ADAPTERS]

    def _now(self, tenant: str, adapter_version: str, now: float) -> float:
        requests, counted = self._demand.get((tenant, adapter_version), (0.0, now))
        return float(requests * 0.5 ** ((now - counted) / HALF_LIFE_SECONDS))
