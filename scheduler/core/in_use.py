"""The adapters that a worker's requests use: how many do, what they take, and whose turn it is since when."""

from collections.abc import Collection


class AdaptersInUse:
    """Adapters with users, from the first that enters to the last that leaves."""

    def __init__(self) -> None:
        # Pages of all of them.
        self.num_pages = 0
        # Adapter -> since when it has users.
        self.turns: dict[str, float] = {}
        self._users: dict[str, int] = {}
        self._pages: dict[str, int] = {}
        self._front_keys: dict[str, int] = {}

    @property
    def names(self) -> Collection[str]:
        return self._users.keys()

    def __contains__(self, adapter: str) -> bool:
        return adapter in self._users

    def pages_of(self, adapter: str) -> int:
        """Raises KeyError when nobody uses it."""
        return self._pages[adapter]

    def enter(self, adapter: str, num_pages: int, now: float) -> None:
        """One more request uses the adapter; the first decides how many pages it takes."""
        users = self._users.get(adapter, 0)
        if not users:
            self._pages[adapter] = num_pages
            self.num_pages += num_pages
            self.turns[adapter] = now
        self._users[adapter] = users + 1

    def leave(self, adapter: str) -> None:
        """One of its requests uses it no more."""
        self._users[adapter] -= 1
        if not self._users[adapter]:
            del self._users[adapter], self.turns[adapter]
            self._front_keys.pop(adapter, None)
            self.num_pages -= self._pages.pop(adapter)

    def front_key(self, adapter: str, order_key: int | None) -> int | None:
        """The order key of what comes in the turn of an adapter that another had to end for; None in other turns.

        `order_key` begins such a turn, which lasts as long as the adapter is in use.
        """
        if order_key is not None:
            self._front_keys[adapter] = order_key
        return self._front_keys.get(adapter)
