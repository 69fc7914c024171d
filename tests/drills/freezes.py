"""Stops ranks (SIGSTOP) at random moments of a tiny run of two, and measures how long until the run ended by itself.

``python tests/drills/freezes.py --freezes 10 --seed 1`` ends with 1 if a freeze was not noticed in time or anything was
lost.

Nobody is above forked ranks, as under srun, so the other rank has to notice; a start of the whole command has its own
launcher, and there all ranks may be stopped, or one before it has joined. The same run is started again, and in the end
compared with one that was never stopped: every row of its metrics and every byte of its weights must be equal. One run
works at a time, while others that were frozen wait for their end.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from drilled_run import RESUMED, DrilledRun, Life

from reflectron.engine.parallel.launch import WATCHDOG_EXIT_CODE
from reflectron.tools.bench.harness import write_tiny_run

_SILENCE_S = 6.0
# What docs/faults.md promises beyond train.heartbeat_timeout_seconds.
NOTICED_WITHIN_S = 15.0
_SETTINGS = [f"train.heartbeat_timeout_seconds={_SILENCE_S:.0f}", "train.collective_timeout_minutes=5"]
_POLL_S = 0.001
_FREEZES_OF_A_RUN = 2
# (who, when, whether by the whole command); the first of them twice as often as the rest, for rank 0 hosts the store.
_CASES = (
    ("rank 0", "step", False),
    ("rank 1", "save", False),
    ("rank 0", "save", False),
    ("rank 1", "step", False),
    ("rank 0", "start", True),
    ("rank 0", "step", False),
    ("rank 1", "export", False),
    ("all ranks", "step", True),
    ("rank 1", "load", False),
    ("rank 0", "export", False),
)


@dataclass
class _Frozen:
    """A start of a run some of whose ranks stand still."""

    life: Life
    victims: list[psutil.Process]
    name: str
    """Who stands still and since when, in words."""
    since: float
    seconds: float | None = None
    """Until all else had ended."""

    def look(self) -> bool:
        """Whether it has ended; then nothing of it is left."""
        waited_for = [self.life.command] if self.life.command else [p for p in self.life.ranks if p not in self.victims]
        if any(process is not None and _runs(process) for process in waited_for):
            return False
        self.seconds = time.monotonic() - self.since
        for victim in self.victims:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        return True

    def complaint(self) -> str:
        """Return what is wrong with its end, or nothing."""
        assert self.seconds is not None
        codes = {process.wait() for process in ([self.life.command] if self.life.command else self.life.ranks)}
        expected = {WATCHDOG_EXIT_CODE} if self.life.command else {WATCHDOG_EXIT_CODE, -signal.SIGKILL}
        if self.seconds > _SILENCE_S + NOTICED_WITHIN_S:
            return f"{self.name}: noticed after {self.seconds:.1f} s"
        if codes != expected:
            return f"{self.name}: exit codes {codes}, expected {expected}: {self.life.tail()}"
        texts = [path.read_text(errors="replace") for path in self.life.run.folder.glob(f"{self.life.output.stem}.*")]
        if not any("nothing was heard from rank" in text or "was stopped (SIGSTOP)" in text for text in texts):
            return f"{self.name}: nobody says what happened: {self.life.tail()}"
        return ""


@dataclass
class _Drill:
    folder: Path
    generator: random.Random
    path: str
    waiting: list[_Frozen] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)

    def new_run(self, name: str) -> DrilledRun:
        return DrilledRun(self.folder / name, self.path, _SETTINGS, 2)

    def look(self) -> None:
        """See which of those that were frozen have ended."""
        for frozen in [frozen for frozen in self.waiting if frozen.look()]:
            self.waiting.remove(frozen)
            assert frozen.seconds is not None
            self.seconds.append(frozen.seconds)
            print(f"noticed: {frozen.name}, after {frozen.seconds:.1f} s", flush=True)
            if complaint := frozen.complaint():
                self.losses.append(complaint)

    def wait(self, life: Life, condition: Callable[[], bool]) -> bool:
        """Whether ``condition`` came true while all processes of ``life`` ran."""
        while life.running():
            if condition():
                return True
            self.look()
            time.sleep(_POLL_S)
        return False

    def freeze(self, run: DrilledRun, who: str, when: str, cold: bool) -> None:
        """Start ``run`` and stop somebody in it."""
        life = run.start(cold=cold)
        # As under srun: nobody is above forked ranks.
        reached = self._reached(life, when)
        life.find_ranks()
        if not reached or not life.running():
            self.losses.append(f"{life.output}: ended before it was frozen: {life.tail()}")
            return
        victims = life.ranks if who == "all ranks" else [life.ranks[int(who[-1])]]
        for victim in victims:
            victim.send_signal(signal.SIGSTOP)
        start = "the command" if cold else "ranks without a launcher"
        self.waiting.append(_Frozen(life, list(victims), f"{who}, {when} ({start})", time.monotonic()))
        print(f"frozen: {who}, {when} ({start}), {time.monotonic() - life.started:.1f} s after its start", flush=True)

    def _reached(self, life: Life, when: str) -> bool:
        # So late that there is a checkpoint.
        steps, delay = self.generator.randint(4, 8), self.generator.random() * 0.03
        if when == "start":

            def started() -> bool:
                life.find_ranks()
                return bool(life.ranks)

            return self.wait(life, started)
        if when == "load":
            reached = self.wait(life, lambda: RESUMED.search(life.text()) is not None)
        elif when == "export":
            reached = self.wait(life, lambda: any((life.run.folder / "out").glob("export*")))
            delay = 0.0
        else:
            reached = self.wait(life, lambda: life.new_rows() >= steps)
            if when == "save":
                reached = reached and self.wait(life, life.is_saving)
        time.sleep(delay)
        return reached

    def idle(self, run: DrilledRun) -> None:
        """Wait until nothing of ``run`` is left."""
        while any(frozen.life.run is run for frozen in self.waiting):
            self.look()
            time.sleep(_POLL_S)


def drill(folder: Path, *, freezes: int, seed: int) -> int:
    """Freeze; 0 when all was noticed in time and nothing was lost, else 1.

    Args:
        folder: of the runs; exists.
        freezes: how often somebody is stopped.
        seed: of the moments.
    """
    began = time.monotonic()
    path = write_tiny_run(folder)
    # So that forked ranks have it already.
    for name in ("tools.commands.train", "tools.run_log", "engine.training.trainer", "engine.parallel.process_groups"):
        importlib.import_module(f"reflectron.{name}")
    state = _Drill(folder, random.Random(seed), str(path))
    reference = state.new_run("reference")
    if code := reference.start(cold=False).wait():
        raise ValueError(f"the run that is drilled ends with exit code {code}")
    runs = [state.new_run(f"run_{number}") for number in range(-(-freezes // _FREEZES_OF_A_RUN))]
    for number, run in _turns(runs, freezes):
        state.idle(run)
        state.freeze(run, *_CASES[number % len(_CASES)])
    for run in runs:
        state.idle(run)
        life = run.start(cold=False)
        state.wait(life, lambda: False)
        if code := life.wait():
            state.losses.append(f"{life.output}: exit code {code}: {life.tail()}")
        if (run.rows(), run.weights()) != (reference.rows(), reference.weights()):
            state.losses.append(f"{run.folder}: metrics or weights differ from those of a run that was never stopped")
    print(*(f"LOST: {loss}" for loss in state.losses), sep="\n", end="")
    print(
        f"frozen {freezes}, noticed {len(state.seconds)} in at most {max(state.seconds, default=0.0):.1f} s, "
        f"losses {len(state.losses)}; {len(runs)} runs compared with one that was never stopped; "
        f"{time.monotonic() - began:.0f} s"
    )
    return 1 if state.losses or len(state.seconds) != freezes else 0


def _turns(runs: list[DrilledRun], freezes: int) -> Iterator[tuple[int, DrilledRun]]:
    """Yield which run is frozen next: each once, then each once more, so that they wait side by side."""
    for number in range(freezes):
        yield number, runs[number % len(runs)]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def main(words: list[str] | None = None) -> int:
    """Drill as the command line says; 0 when every freeze was noticed in time and nothing was lost, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="freezes.py", description="stop ranks of a training again and again")
    parser.add_argument("--freezes", type=int, default=10, help="how often ranks are stopped (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keep the runs in DIR, which must not exist yet")
    args = parser.parse_args(words)
    if args.freezes < 1:
        parser.error(f"--freezes is {args.freezes}, expected at least 1")
    # Before torch is imported: this process forks the ranks, and they are a run on the CPU.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="reflectron-freezes-") as temporary:
        folder = Path(temporary) / "drill" if args.folder is None else args.folder
        folder.mkdir(parents=True)
        return drill(folder, freezes=args.freezes, seed=args.seed)


if __name__ == "__main__":
    sys.exit(main())
