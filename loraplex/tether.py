"""Becomes another program that dies with the process that started it.

Run as `python tether.py PARENT_PID PROGRAM ARGUMENT...`. Linux keeps the parent-death signal over exec; elsewhere the
program is only started. Setting it here, not between fork and exec in the parent, keeps the parent free to have gRPC
threads.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent_pid, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before the signal was set.
    if os.getppid() == parent_pid:
        os.execv(command[0], command)


if __name__ == "__main__":
    main()
