"""The ranks of ``test_watchdog.py``: ``python watchdog_ranks.py PLAN.json``.

Imports once and forks the ranks of all cases, which run side by side because most of their time is waiting. A rank does
steps of one collective each; at the third, it does what the case says. The plan names each case's number of ranks; rank
N prints to ``CASE.N.log`` beside it, and ``codes.json`` gets the exit codes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from reflectron.engine.parallel.launch import ProcessPlace, die_with, free_port
from reflectron.engine.parallel.watchdog import Progress, Watchdog, WatchdogLimits

# Of the job, and so many times longer than anything here takes on a busy machine.
SILENCE_S, STEPS = 8.0, 4


def rank_main(case: str) -> None:
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


def start(case: str, place: ProcessPlace, log: Path) -> int:
    """Process id of a new rank, which ends as the interpreter does."""
    parent = os.getpid()
    if pid := os.fork():
        return pid
    die_with(parent)
    os.environ |= place.variables()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    rank_main(case)
    sys.exit()


def main(plan: Path) -> None:
    ranks: dict[str, list[int]] = {}
    for case, world_size in json.loads(plan.read_text(encoding="utf-8")).items():
        port = free_port()
        places = [
            ProcessPlace(
                rank=rank, world_size=world_size, local_rank=rank, master_address="127.0.0.1", master_port=port
            )
            for rank in range(world_size)
        ]
        ranks[case] = [start(case, place, plan.with_name(f"{case}.{place.rank}.log")) for place in places]
    # A stopped rank ends only by SIGKILL, once the others have.
    stopped = ranks["stopped"][1]
    codes = {pid: exit_code(pid) for pids in ranks.values() for pid in pids if pid != stopped}
    os.kill(stopped, signal.SIGKILL)
    codes[stopped] = exit_code(stopped)
    result = {case: [codes[pid] for pid in pids] for case, pids in ranks.items()}
    plan.with_name("codes.json").write_text(json.dumps(result), encoding="utf-8")


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
