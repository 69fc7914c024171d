"""The ranks of ``test_watchdog.py``: ``python watchdog_ranks.py PLAN.json``.

Imports once and forks the ranks of the cases, which run side by side because most of their time is waiting. A rank does
steps of one collective each; at the third, it does what the case says. The plan names each case's number of ranks; rank
N prints to ``CASE.N.log`` beside it, and ``codes.json`` gets the exit codes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from reflectron.engine.parallel import process_groups
from reflectron.engine.parallel.judge import Note, RankProgress, Seal, WatchdogLimits, note_text
from reflectron.engine.parallel.launch import RUN_SECRET, ProcessPlace, die_with, free_port
from reflectron.engine.parallel.process_groups import join_store
from reflectron.engine.parallel.watchdog import Watchdog

# Of the job, and so many times longer than anything here takes on a busy machine.
SILENCE_S, STEPS, AT_ONCE = 8.0, 4, 6
# case: ranks that stand still at the third step
STOPPED = {"stopped": (1,), "stopped main": (0,), "stopped two": (0, 1)}


def rank_main(case: str) -> None:
    rank, progress = int(os.environ["RANK"]), RankProgress()
    if case == "stopped before it joins" and rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    # The start may take six times as long.
    hang_s = {"hang": 3.0, "stopped before it joins": 1.0}.get(case, 0.0)
    limits = WatchdogLimits(hang_s=hang_s, silence_s=SILENCE_S)
    watchdog = Watchdog(progress, limits, beat_s=0.2)
    try:
        store = join_store(60)
        if case == "stopped main before others join" and rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
        for step in range(1, STEPS + 1):
            progress.enter("waiting for data", step)
            if step == 3:
                # What is seen of a rank is what it has said; it says something at every beat.
                watchdog._talk._said.clear()
                watchdog._talk._said.wait(60)
                act(case, rank)
            progress.enter("training")
            dist.all_reduce(torch.ones(1))
        progress.enter("leaving the job")
        dist.barrier()
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
    if rank in STOPPED.get(case, ()):
        os.kill(os.getpid(), signal.SIGSTOP)
    if case == "stopped for a while" and rank in (0, 1):
        stop_for(SILENCE_S / 2 if rank == 0 else SILENCE_S / 4)
    if (case, rank) == ("failing", 1):
        raise MemoryError("no room for\n the activations")
    if (case, rank) == ("stranger", 1):
        be_stranger()


def stop_for(seconds: float) -> None:
    """Stand still until a child has us continue."""
    pid = os.getpid()
    if os.fork() == 0:
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)
        os._exit(0)
    os.kill(pid, signal.SIGSTOP)


def be_stranger() -> None:
    """Write and remove what somebody could who reaches the store but knows no secret; longer than any limit of time."""
    store = process_groups.connect_again(5)
    seal = Seal()
    prefixed = [PrefixStore(prefix, store) for prefix in ("watchdog0", seal.prefix())]
    forged = Note(host="\x1b]0;gotcha\x07", words="\x1b[2Jwords of a stranger", order=1, beats=10**9)
    end = time.monotonic() + 1.5 * SILENCE_S
    while time.monotonic() < end:
        for place in prefixed:
            place.set("verdict", "\x1b[2Jverdict of a stranger")
            for rank in range(3):
                place.set(f"rank{rank}", random.choice(["", "x", "{}", "[" * 5000, note_text(forged), "y" * 100_000]))
            place.delete_key("rank1")
            place.set("failures", "none")
        time.sleep(0.5)


def start(case: str, place: ProcessPlace, log: Path) -> int:
    """Process id of a new rank, which ends as the interpreter does."""
    parent = os.getpid()
    if pid := os.fork():
        return pid
    die_with(parent)
    os.environ |= {**place.variables(), RUN_SECRET: "known to the ranks"}
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    rank_main(case)
    sys.exit()


def main(plan: Path) -> None:
    cases = list(json.loads(plan.read_text(encoding="utf-8")).items())
    codes: dict[str, list[int]] = {}
    # More at once would starve each other on a small machine.
    for begin in range(0, len(cases), AT_ONCE):
        codes |= run_side_by_side(dict(cases[begin : begin + AT_ONCE]), plan)
    plan.with_name("codes.json").write_text(json.dumps(codes), encoding="utf-8")


def run_side_by_side(cases: dict[str, int], plan: Path) -> dict[str, list[int]]:
    """Exit codes of each case's ranks."""
    ranks: dict[str, list[int]] = {}
    for case, world_size in cases.items():
        port = free_port()
        places = [
            ProcessPlace(
                rank=rank, world_size=world_size, local_rank=rank, master_address="127.0.0.1", master_port=port
            )
            for rank in range(world_size)
        ]
        ranks[case] = [start(case, place, plan.with_name(f"{case}.{place.rank}.log")) for place in places]
    codes: dict[int, int] = {}
    for case, pids in ranks.items():
        # A stopped rank ends only by SIGKILL, once the others have.
        stopped = [pids[rank] for rank in stopped_in(case)]
        codes |= {pid: exit_code(pid) for pid in pids if pid not in stopped}
        for pid in stopped:
            os.kill(pid, signal.SIGKILL)
            codes[pid] = exit_code(pid)
    return {case: [codes[pid] for pid in pids] for case, pids in ranks.items()}


def stopped_in(case: str) -> tuple[int, ...]:
    """Ranks that never continue."""
    at_start = {"stopped before it joins": (1,), "stopped main before others join": (0,)}
    return (STOPPED | at_start).get(case, ())


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
