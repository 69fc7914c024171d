"""Kills at random moments and damages at random places; out comes a count of faults and of what they cost.

A run is killed and started again until it ends, then compared with one that was never stopped: every row of its metrics
and every byte of its weights must be equal. The next run begins until all kills are done. Between two starts the newest
checkpoint is damaged now and then: the next start must name the file and go on from the one before.
"""

from __future__ import annotations

import importlib
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from reflectron.engine.checkpoint.manifest import DamagedCheckpoint, check_file, read_manifest
from reflectron.engine.checkpoint.retention import step_folder, steps_to_try
from reflectron.tools.bench.drilled_run import DrilledRun, Life
from reflectron.tools.bench.tiny_run import write_tiny_run
from reflectron.tools.load_config import load_config
from reflectron.tools.ranks import local_processes

# One start in so many is the whole command with its imports; then it may be the victim, too.
_COLD_EVERY = 6
_DAMAGE_EVERY = 4
_POLL_S = 0.001
_DAMAGES = ("flipped bit", "cut end", "missing file")


@dataclass
class Tally:
    """What was done and what was lost."""

    moments: Counter[str] = field(default_factory=Counter)
    victims: Counter[str] = field(default_factory=Counter)
    damages: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    """Compared with the one that was never stopped."""
    cold: int = 0
    """Kills in a start of the whole command."""
    losses: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """So far."""
        return self.moments.total()

    def lines(self) -> list[str]:
        """The result, for a user."""
        return [
            f"{self.kills} kills: {_counts(self.moments)}",
            f"victims: {_counts(self.victims)}; {self.cold} starts were the whole command, the others forked ranks",
            f"{self.damages.total()} damaged checkpoints: {_counts(self.damages)}",
            f"{self.runs} killed runs compared with one that was never stopped",
            *(f"LOST: {loss}" for loss in self.losses),
            f"faults {self.kills + self.damages.total()}, losses {len(self.losses)}",
        ]


def drill(folder: Path, config: str | None, overrides: list[str], *, kills: int, seed: int) -> int:
    """Kill and damage; 0 when nothing was lost, else 1.

    Args:
        folder: of the runs; exists.
        config: YAML file of what is drilled; a tiny run of two ranks when None.
        overrides: of its settings.
        kills: SIGKILLs in all.
        seed: of moments, victims and damages.
    """
    path = str(write_tiny_run(folder)) if config is None else config
    world_size = local_processes(load_config(path, overrides).parallel)
    # So that forked ranks have it already.
    for name in ("tools.train", "tools.run_log", "engine.trainer", "engine.parallel.process_groups"):
        importlib.import_module(f"reflectron.{name}")
    began, generator, tally = time.monotonic(), random.Random(seed), Tally()
    reference = DrilledRun(folder / "reference", path, overrides, world_size)
    load_s = _run_reference(reference)
    while tally.kills < kills and not tally.losses:
        tally.runs += 1
        run = DrilledRun(folder / f"run_{tally.runs}", path, overrides, world_size)
        _drill_run(run, generator, load_s, kills, tally)
        if run.rows() != reference.rows():
            tally.losses.append(f"{run.folder}: metrics differ from {reference.folder}")
        if run.weights() != reference.weights():
            tally.losses.append(f"{run.folder}: weights differ from {reference.folder}")
    print(*tally.lines(), f"{time.monotonic() - began:.0f} s", sep="\n", flush=True)
    return 1 if tally.losses else 0


def _run_reference(reference: DrilledRun) -> float:
    """Run to the end, undisturbed; seconds from the start to the first step."""
    life = reference.start(cold=False)
    while life.running() and life.new_rows() < 0:
        time.sleep(_POLL_S)
    seconds = time.monotonic() - life.started
    if code := life.wait():
        raise ValueError(f"the run that is drilled ends with exit code {code}: {life.tail()}")
    return seconds


def _drill_run(run: DrilledRun, generator: random.Random, load_s: float, kills: int, tally: Tally) -> None:
    """Start ``run`` until it ends, and strike as long as there are kills to do."""
    damaged: Path | None = None
    while True:
        if tally.damages.total() < tally.kills // _DAMAGE_EVERY and damaged is None:
            damaged = _damage(run, generator, tally)
        life = run.start(cold=tally.kills % _COLD_EVERY == _COLD_EVERY - 1)
        struck = tally.kills < kills and _strike(life, generator, load_s, tally)
        code = 0 if struck else life.wait()
        if damaged is not None and "going on after step " in life.text():
            if str(damaged) not in life.text():
                tally.losses.append(f"{life.output} does not name {damaged}, which is damaged")
            damaged = None
        if code:
            tally.losses.append(f"{life.output}: exit code {code}: {life.tail()}")
        if not struck:
            return


def _strike(life: Life, generator: random.Random, load_s: float, tally: Tally) -> bool:
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


def _damage(run: DrilledRun, generator: random.Random, tally: Tally) -> Path | None:
    """Damage a file of the newest checkpoint, if it is intact and not the only one; the file."""
    steps = steps_to_try(run.checkpoints)
    if len(steps) < 2 or not _intact(step_folder(run.checkpoints, steps[0])):
        return None
    path = generator.choice(sorted(step_folder(run.checkpoints, steps[0]).iterdir()))
    content, kind = bytearray(path.read_bytes()), _DAMAGES[tally.damages.total() % len(_DAMAGES)]
    place = generator.randrange(len(content))
    if kind == "missing file":
        path.unlink()
    elif kind == "cut end":
        path.write_bytes(content[:place])
    else:
        content[place] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
    tally.damages[kind] += 1
    return path


def _intact(folder: Path) -> bool:
    try:
        for name, digest in read_manifest(folder).files.items():
            check_file(folder / name, digest)
    except DamagedCheckpoint:
        return False
    return True


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counter.items())) or "none"
