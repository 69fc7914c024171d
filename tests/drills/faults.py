"""Kills a training at random and at chosen moments, damages every kind of file, and counts what that cost.

``python tests/drills/faults.py --kills 30 --injuries 60 --seed 1`` drills a tiny run of two ranks, with a configuration
of one's own that one, on the CPU. It prints the counts and ends with 1 if anything was lost.

A run is killed and started again until it ends, then compared with one that was never stopped: every row of its metrics
and every byte of its weights must be equal. The next run begins until all kills are done. Before a start, files of the
run are damaged: it must name a damaged checkpoint and use the one before, mend or ignore the rest, or refuse in one
line; then the file is put back.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from drilled_run import RESUMED, DrilledRun, Life, Trap
from injuries import Injury, injure_beside, injure_checkpoint, scatter_leftovers

from reflectron.tools.bench.harness import write_tiny_run
from reflectron.tools.load_config import load_config
from reflectron.tools.ranks import local_processes

# One start in so many is the whole command with its imports; then it may be the victim, too.
_COLD_EVERY = 6
# The others are kills at a random moment.
_TRAP_EVERY = 2
_POLL_S = 0.001
_PARTIAL = r"step_\d+\.[^/]+\.partial"
TRAPS = (
    Trap("while tokenising", "open", r"\.arrow\.[^/]+\.tmp$"),
    Trap("before the first checkpoint", "os.mkdir", _PARTIAL + "$"),
    Trap("while writing tensors", "open", _PARTIAL + r"/__0_0\.distcp$", 2),
    Trap("while writing the manifest", "open", r"manifest\.json\.[^/]+\.tmp$", 2),
    Trap("before a checkpoint gets its name", "os.rename", _PARTIAL + "$", 2),
    Trap("before latest moves", "os.rename", r"/latest\.[^/]+\.tmp$", 2),
    Trap("before latest moves for the first time", "os.rename", r"/latest\.[^/]+\.tmp$"),
    Trap("before an old checkpoint goes", "os.rename", r"/step_\d+$"),
    Trap("while an old checkpoint goes", "os.rmdir", _PARTIAL + "$"),
    Trap("before the export", "os.mkdir", r"/export\.[^/]+\.partial$"),
    Trap("while exporting", "open", r"/export\.[^/]+\.partial/config\.json$"),
    Trap("before the export gets its name", "os.rename", r"/export\.[^/]+\.partial$"),
    Trap("before the run is noted as finished", "os.rename", r"/finished\.json\.[^/]+\.tmp$"),
    Trap("while rows are cut", "os.rename", r"/metrics\.jsonl\.[^/]+\.tmp$"),
    Trap("while a lock is taken", "os.link", r"/job\.lock\.[^/]+\.tmp$"),
)


@dataclass
class FaultTally:
    """What was done and what was lost."""

    moments: Counter[str] = field(default_factory=Counter)
    victims: Counter[str] = field(default_factory=Counter)
    injured: Counter[str] = field(default_factory=Counter)
    """By kind of file."""
    damages: Counter[str] = field(default_factory=Counter)
    """By kind of damage."""
    refused: int = 0
    """Starts that named the damage in one line and ended."""
    runs: int = 0
    """Compared with the one that was never stopped."""
    traps: int = 0
    """Set so far."""
    cold: int = 0
    """Kills in a start of the whole command."""
    losses: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """So far."""
        return self.moments.total()

    @property
    def injuries(self) -> int:
        """So far."""
        return self.damages.total()

    def lines(self) -> list[str]:
        """Return the result, for a user."""
        return [
            f"{self.kills} kills: {_counts(self.moments)}",
            f"victims: {_counts(self.victims)}; {self.cold} starts were the whole command, the others forked ranks",
            f"{self.injuries} injuries to {_counts(self.injured)}",
            f"by {_counts(self.damages)}; {self.refused} starts refused with a line",
            f"{self.runs} killed runs compared with one that was never stopped",
            *(f"LOST: {loss}" for loss in self.losses),
            f"faults {self.kills + self.injuries}, losses {len(self.losses)}",
        ]


def drill(folder: Path, config: str | None, overrides: list[str], *, kills: int, injuries: int, seed: int) -> int:
    """Kill and damage; 0 when nothing was lost, else 1.

    Args:
        folder: of the runs; exists.
        config: YAML file of what is drilled; a tiny run of two ranks when None.
        overrides: of its settings.
        kills: SIGKILLs in all, at least.
        injuries: damaged files in all, at least.
        seed: of moments, victims and damages.
    """
    path = str(write_tiny_run(folder)) if config is None else config
    world_size = local_processes(load_config(path, overrides).parallel)
    # So that forked ranks have it already.
    for name in (
        "tools.commands.train",
        "tools.run_log",
        "tools.run_log",
        "engine.training.trainer",
        "engine.parallel.process_groups",
    ):
        importlib.import_module(f"reflectron.{name}")
    began, generator, tally = time.monotonic(), random.Random(seed), FaultTally()
    reference = DrilledRun(folder / "reference", path, overrides, world_size)
    load_s = _run_reference(reference)
    want = _Wanted(kills, injuries, load_s)
    while want.more(tally) and not tally.losses:
        tally.runs += 1
        run = DrilledRun(folder / f"run_{tally.runs}", path, overrides, world_size)
        _drill_run(run, generator, want, tally)
        if run.rows() != reference.rows():
            tally.losses.append(f"{run.folder}: metrics differ from {reference.folder}")
        if run.weights() != reference.weights():
            tally.losses.append(f"{run.folder}: weights differ from {reference.folder}")
    print(*tally.lines(), f"{time.monotonic() - began:.0f} s", sep="\n", flush=True)
    return 1 if tally.losses else 0


@dataclass(frozen=True)
class _Wanted:
    """What is to be done in all."""

    kills: int
    injuries: int
    load_s: float
    """From a start to the first step."""

    def more(self, tally: FaultTally) -> bool:
        """Whether there is something left to do; injuries come between a kill and the next start."""
        return tally.kills < self.kills or tally.injuries < self.injuries


def _run_reference(reference: DrilledRun) -> float:
    """Run to the end, undisturbed; seconds from the start to the first step."""
    life = reference.start(cold=False)
    while life.running() and life.new_rows() < 0:
        time.sleep(_POLL_S)
    seconds = time.monotonic() - life.started
    if code := life.wait():
        raise ValueError(f"the run that is drilled ends with exit code {code}: {life.tail()}")
    return seconds


def _drill_run(run: DrilledRun, generator: random.Random, want: _Wanted, tally: FaultTally) -> None:
    """Start ``run`` until it ends, and strike as long as there is something to do."""
    while True:
        injuries = _injure(run, generator, want, tally)
        cold = tally.kills % _COLD_EVERY == _COLD_EVERY - 1
        trap = None
        if not cold and tally.kills % _TRAP_EVERY == 0:
            # The next one, also where the last did not spring, as that of a resumed run in one that begins.
            trap, tally.traps = TRAPS[tally.traps % len(TRAPS)], tally.traps + 1
        life = run.start(cold=cold, trap=trap if want.more(tally) else None)
        if not want.more(tally):
            struck = False
        elif life.trapped:
            struck = _spring(life, trap, tally)
        else:
            struck = _strike(life, generator, want.load_s, tally)
        code = 0 if struck else life.wait()
        if code == 2 and (named := _named_in_refusal(life, injuries)):
            # The others stay: this start may have gone back behind a damaged checkpoint already.
            for injury in named:
                injury.heal()
            tally.refused += 1
            continue
        _look_at_names(life, injuries, tally)
        if code:
            tally.losses.append(f"{life.output}: exit code {code}: {life.tail()}; {', '.join(map(str, injuries))}")
        if not struck and (code or not want.more(tally) or _is_finished(run)):
            return


def _injure(run: DrilledRun, generator: random.Random, want: _Wanted, tally: FaultTally) -> list[Injury]:
    """Damage a file of the newest checkpoint and one beside; leftovers of others lie around, too."""
    out = run.folder / "out"
    if tally.injuries >= want.injuries or not (out / "config.yaml").is_file():
        return []
    scatter_leftovers(out)
    found = [injure_checkpoint(run.checkpoints, generator, tally.injuries)]
    found.append(injure_beside(out, generator, tally.injuries))
    injuries = [injury for injury in found if injury is not None]
    for injury in injuries:
        tally.injured[injury.kind] += 1
        tally.damages[injury.damage] += 1
    return injuries


def _named_in_refusal(life: Life, injuries: list[Injury]) -> list[Injury]:
    """Return what the one line names with which a start was refused; nothing when there is another or no such line."""
    errors = [line for line in life.text().splitlines() if line.startswith("reflectron train: error: ")]
    if len(errors) != 1 or "Traceback" in life.text():
        return []
    return [injury for injury in injuries if str(injury.path) in errors[0]]


def _look_at_names(life: Life, injuries: list[Injury], tally: FaultTally) -> None:
    """Count a loss where a start that came to its checkpoint has not named the one that is damaged."""
    resumed = RESUMED.search(life.text())
    for injury in injuries:
        # A later one was complete, though a kill came before `latest` named it.
        needed = resumed and injury.step is not None and int(resumed[1]) <= injury.step
        if needed and str(injury.path) not in life.text():
            tally.losses.append(f"{life.output} does not name {injury}")


def _is_finished(run: DrilledRun) -> bool:
    return (run.folder / "out" / "finished.json").is_file()


def _spring(life: Life, trap: Trap | None, tally: FaultTally) -> bool:
    """Wait until the trap has killed the main rank; False when the run came to its end before."""
    assert trap is not None, "the life has been started with it"
    while life.running():
        time.sleep(_POLL_S)
    if life.killed_by_trap():
        life.kill([])
        tally.moments[trap.name] += 1
        tally.victims["rank 0"] += 1
        print(
            f"kill {tally.kills}: rank 0 {trap.name}, {time.monotonic() - life.started:.1f} s after its start",
            flush=True,
        )
        return True
    return False


def _strike(life: Life, generator: random.Random, load_s: float, tally: FaultTally) -> bool:
    """Wait for a random moment and kill at random; False when the run came to its end before."""
    wanted = generator.choice(("start", "step", "save"))
    steps, delay = generator.randint(1, 5), generator.random()
    if wanted == "start" and life.command is None:
        reached = _wait(life, lambda: time.monotonic() - life.started > delay * load_s)
    else:
        reached = _wait(life, lambda: life.new_rows() >= steps)
        if wanted == "save":
            reached = reached and _wait(life, life.is_saving)
        # Into the middle of a step or save, of which none takes longer here.
        time.sleep(delay * 0.05)
    life.find_ranks()
    if not reached or not life.ranks or not life.running():
        return False
    name, victims = life.pick(generator)
    moment = _moment(life)
    seconds = time.monotonic() - life.started
    life.kill(victims)
    tally.moments[moment] += 1
    tally.victims[name] += 1
    tally.cold += life.command is not None
    print(f"kill {tally.kills}: {name} {moment}, {seconds:.1f} s after its start", flush=True)
    return True


def _moment(life: Life) -> str:
    if life.new_rows() < 0:
        return "while starting or loading"
    return "in saves" if life.is_saving() else "in steps"


def _wait(life: Life, condition: Callable[[], bool]) -> bool:
    """Whether ``condition`` came true while all processes ran."""
    while life.running():
        if condition():
            return True
        time.sleep(_POLL_S)
    return False


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counter.items())) or "none"


def main(words: list[str] | None = None) -> int:
    """Drill as the command line says; 0 when nothing was lost, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="faults.py", description="kill a training again and again, damage its files")
    parser.add_argument("config", nargs="?", help="YAML file of the run; a tiny one of 2 ranks if none")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that win over the file's")
    parser.add_argument("--kills", type=int, default=30, help="SIGKILLs in all (default 30)")
    parser.add_argument("--injuries", type=int, default=60, help="damaged files in all (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="of moments, victims and damages (default 0)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keep the runs in DIR, which must not exist yet")
    args = parser.parse_intermixed_args(words)
    if args.kills < 1:
        parser.error(f"--kills is {args.kills}, expected at least 1")
    if args.injuries < 0:
        parser.error(f"--injuries is {args.injuries}, expected 0 or more")
    # Before torch is imported: this process forks the ranks, and they are a run on the CPU.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory(prefix="reflectron-faults-") as temporary:
        folder = Path(temporary) / "drill" if args.folder is None else args.folder
        folder.mkdir(parents=True)
        return drill(folder, args.config, args.overrides, kills=args.kills, injuries=args.injuries, seed=args.seed)


if __name__ == "__main__":
    sys.exit(main())
