"""Named places where a test may kill the process as `kill -9` would: `LORAPLEX_FAILPOINT=NAME` arms one.

In the order in which an upload passes them. Unarmed, as always in production, a place costs one comparison.
"""

import os
import signal
from typing import Literal, get_args

Place = Literal[
    "staging-open",
    "mid-chunk",
    "after-fsync",
    "after-rename",
    "before-metadata",
    "before-journal",
    "after-journal",
    "after-metadata",
]
PLACES: tuple[Place, ...] = get_args(Place)

_armed = os.environ.get("LORAPLEX_FAILPOINT", "")


def failpoint(place: Place) -> None:
    """Kills the process if it is armed for this place."""
    if place == _armed:
        os.kill(os.getpid(), signal.SIGKILL)
