"""What a person sees while it runs; standard output is for rows alone."""

import sys
import time

_STARTED = time.monotonic()


def say(sentence: str) -> None:
    seconds = int(time.monotonic() - _STARTED)
    print(f"[{seconds // 60:2d}:{seconds % 60:02d}] {sentence}", file=sys.stderr, flush=True)
