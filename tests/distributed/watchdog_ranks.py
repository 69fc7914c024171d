"""One rank of the jobs of ``test_watchdog.py``: ``python watchdog_ranks.py CASE``.

Steps of one collective each; at the third, a rank does what the case says.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

import torch
import torch.distributed as dist

from reflectron.engine.parallel.watchdog import Progress, Watchdog, WatchdogLimits

# Of the job, and so many times longer than anything here takes on a busy machine.
SILENCE_S, STEPS = 8.0, 4


def main(case: str) -> None:
    dist.init_process_group("gloo")
    rank, progress = dist.get_rank(), Progress()
    limits = WatchdogLimits(hang_s=3.0 if case == "hang" else 0.0, silence_s=SILENCE_S)
    watchdog = Watchdog(progress, limits, beat_s=0.2)
    try:
        for step in range(1, STEPS + 1):
            progress.enter("waiting for data", step)
            if step == 3:
                act(case, rank)
            progress.enter("training")
            dist.all_reduce(torch.ones(1))
    except Exception as error:
        watchdog.last_words(error)
    watchdog.stop()
    dist.barrier()
    dist.destroy_process_group()
    print("finished")


def act(case: str, rank: int) -> None:
    if (case, rank) == ("hang", 1):
        threading.Event().wait()
    if (case, rank) in (("killed", 2), ("killed main", 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    if (case, rank) == ("stopped", 1):
        os.kill(os.getpid(), signal.SIGSTOP)
    if (case, rank) == ("failing", 1):
        raise MemoryError("no room for\n the activations")


if __name__ == "__main__":
    main(sys.argv[1])
