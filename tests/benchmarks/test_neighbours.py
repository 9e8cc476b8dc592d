"""What others took of the machine: all work but that of this process and of all that it started."""

import subprocess
import sys
import threading
from subprocess import PIPE

from benchmarks.serving.neighbours import TICKS_PER_SECOND, Neighbours, work_seconds
from benchmarks.serving.outcome import Outcome, with_children

# CPU seconds that the child spends, many times the resolution of the counters.
SPENT = "import time\nwhile time.process_time() < 0.5: pass\nprint('done', flush=True)\ninput()"


def test_idle_time_and_time_stolen_by_the_host_are_no_work() -> None:
    seconds = work_seconds("cpu  100 20 3 9999 888 4 5 777 60 50")
    assert seconds * TICKS_PER_SECOND == 100 + 20 + 3 + 4 + 5


def test_a_child_of_another_thread_is_family() -> None:
    started: list[subprocess.Popen[str]] = []
    ready, ends = threading.Event(), threading.Event()

    def start() -> None:
        started.append(subprocess.Popen([sys.executable, "-c", SPENT], text=True, stdin=PIPE, stdout=PIPE))
        ready.set()
        ends.wait()

    thread = threading.Thread(target=start)
    thread.start()
    ready.wait()
    child = started[0]
    assert child.stdout is not None
    assert child.stdin is not None
    try:
        assert child.stdout.readline() == "done\n"
        assert child.pid in with_children(threading.get_native_id())
    finally:
        child.communicate("\n")
        ends.set()
        thread.join()


def test_what_a_child_spent_is_not_the_neighbours() -> None:
    with open("/proc/stat") as file:
        before = work_seconds(file.readline())
    neighbours = Neighbours()
    subprocess.run([sys.executable, "-c", SPENT], input="\n", text=True, check=True, stdout=subprocess.DEVNULL)
    others = neighbours.seconds()
    with open("/proc/stat") as file:
        everybody = work_seconds(file.readline()) - before
    # The counters are samples, and ours are another kind of sample than everybody's: half of it is far from none.
    assert everybody - others >= 0.25


def test_cores_are_seconds_over_the_run() -> None:
    assert Outcome(2.0, ((1,),), ((0.1,),), 1, neighbour_seconds=3.0).neighbour_cores == 1.5
