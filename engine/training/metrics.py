"""A step's row of numbers, written as JSON lines and to TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import resource
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from reflectron.engine.config import Config
from reflectron.engine.files import append_whole, one_line, write_text, write_whole
from reflectron.engine.parallel.process_groups import ParallelGroups
from reflectron.engine.training.terms import MeanTerms


@dataclass(frozen=True, kw_only=True)
class StepMetrics(MeanTerms):
    """The row that ``metrics.jsonl`` records of a step; tokens and rates are of the whole job, not of a rank."""

    step: int
    """1-based: updates done."""
    mask_rate: float
    """Rate of the dynamic mask, 0 to 1."""
    learning_rate: float
    """Learning rate of the update."""
    grad_norm: float
    """L2 norm of the whole gradient before clipping."""
    skipped: bool
    """The update was skipped, because loss or gradient were not finite."""
    tokens_teacher: int
    """Tokens of teacher views that entered the model."""
    tokens_student: int
    """Tokens of student views that entered the model."""
    tokens_generation: int
    """Tokens of generation samples that entered the model."""
    tokens_saved: int
    """Tokens of reflection samples that the student views save: hidden, or shared with the teacher view."""
    pack_fill: float
    """Real tokens / padded tokens."""
    step_time_ms: float
    """Wall time of the step, waiting for data included."""
    data_wait_ms: float
    """Time of it that the main rank waited for its batch, which is prepared while the step before it runs."""
    tokens_per_second: float
    """Real tokens that entered the model / wall time."""
    peak_memory_gib: float
    """Largest of all ranks so far: allocated on the device with CUDA, resident of the process without."""


class MetricsLog:
    """Writes the rows of one run; used on the main rank only.

    A run that resumes keeps its rows up to its checkpoint and drops the later ones, which it will write again. A run
    that begins keeps the files of an earlier one as ``metrics.previous.jsonl`` and so on.

    Args:
        config: the run.
        first_step: updates before the first row that will be written.
    """

    def __init__(self, config: Config, first_step: int) -> None:
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.notes: list[str] = []
        """Lines for a person, about damaged files and what is no longer written."""
        for name in ("metrics", "validation", "evaluation", "nonfinite", "spikes"):
            path = folder / f"{name}.jsonl"
            if path.exists() and first_step:
                damage = _drop_rows_after(path, first_step)
                self.notes += [damage] if damage else []
            elif path.exists():
                path.replace(folder / f"{name}.previous.jsonl")
        self._folder = folder
        self._files = {"metrics": MetricsFile(folder / "metrics.jsonl")}
        self._tensorboard = None
        if config.train.tensorboard:
            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self._wandb = WandbRun(config) if config.train.wandb_project else None

    @property
    def waiting(self) -> str:
        """The reason why rows wait in memory to be written; empty when none do."""
        return next((file.waiting for file in self._files.values() if file.waiting), "")

    def write(self, row: StepMetrics) -> None:
        """Record one step."""
        values = dataclasses.asdict(row)
        self.append("metrics", {"step": row.step, **values})
        self._write_elsewhere("train", row.step, values)

    def write_validation(self, step: int, values: dict[str, Any]) -> None:
        """Record one validation after ``step`` updates, in ``validation.jsonl``."""
        self._write_beside("validation", step, values)

    def write_evaluation(self, step: int, values: dict[str, Any]) -> None:
        """Record one evaluation after ``step`` updates, in ``evaluation.jsonl``."""
        self._write_beside("evaluation", step, values)

    def _write_beside(self, name: str, step: int, values: dict[str, Any]) -> None:
        self.append(name, {"step": step, **values})
        self._write_elsewhere(name, step, values)

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Add a row to ``<name>.jsonl``; by its ``step`` a run that resumes keeps or drops it."""
        if name not in self._files:
            self._files[name] = MetricsFile(self._folder / f"{name}.jsonl")
        self._files[name].append(row)

    def _write_elsewhere(self, group: str, step: int, values: dict[str, Any]) -> None:
        named = {f"{group}/{key}": value for key, value in values.items() if value is not None and key != "step"}
        if self._tensorboard is not None:
            try:
                for key, value in named.items():
                    self._tensorboard.add_scalar(key, value, step)
            except OSError as error:
                # The events repeat what metrics.jsonl holds; their writer does not recover.
                self._tensorboard = None
                self.notes.append(f"TensorBoard events end here, training continues: {one_line(error)}")
        if self._wandb is not None:
            self._wandb.log(named, step=step)

    def close(self) -> None:
        """Flush and close everything; a second call does nothing."""
        while self._files:
            self._files.popitem()[1].close()
        if self._tensorboard is not None:
            with contextlib.suppress(OSError):
                self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


class MetricsFile:
    """Appends rows of JSON, each whole or not at all; on a full disk they wait in memory for the next try."""

    waiting: str
    """The reason why rows wait; empty when all are written."""

    def __init__(self, path: Path) -> None:
        self.waiting = ""
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._rows = b""

    def append(self, row: dict[str, Any]) -> None:
        """Write ``row`` behind the others; NaN and infinity, which JSON has not, as null."""
        wrong = {key: None for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
        self._rows += json.dumps(row | wrong).encode() + b"\n"
        self._write()

    def close(self) -> None:
        """Try once more to write the rows that wait, and close the file."""
        self._write()
        os.close(self._descriptor)

    def _write(self) -> None:
        try:
            append_whole(self._descriptor, self._rows)
        except OSError as error:
            self.waiting = f"{self._path}: {error.strerror}"
        else:
            self._rows, self.waiting = b"", ""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON lines file, each with its ``step``; other lines, as one cut short, are skipped."""
    return _rows_and_damage(path)[0]


def _rows_and_damage(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the rows, and the number of other lines, a last one that was cut short not counted."""
    *lines, _ = path.read_bytes().split(b"\n")
    rows = [row for row in map(_row, lines) if row is not None]
    return rows, len(lines) - len(rows)


def _row(line: bytes) -> dict[str, Any] | None:
    """Return the row if it has a ``step`` and every metric in it is a number or null, else None."""
    try:
        row = json.loads(line)
        sound = type(row["step"]) is int and all(_is_number(row[name]) for name in _NUMBERS & row.keys())
        return row if sound else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


_NUMBERS = frozenset(field.name for field in dataclasses.fields(StepMetrics))


def _is_number(value: object) -> bool:
    # An integer of hundreds of digits cannot be drawn.
    return value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 1 << 63)


def _drop_rows_after(path: Path, step: int) -> str:
    """Rewrite a file of rows without those after ``step``; return a line about damage, empty when there is none."""
    rows, damaged = _rows_and_damage(path)
    note = ""
    if damaged:
        kept = path.with_suffix(".damaged.jsonl")
        write_whole(kept, lambda stream: stream.write(path.read_bytes()))
        note = f"{path}: {damaged} lines are not rows and were skipped; {kept} keeps the file as it was"
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
    return note


class WandbRun:
    """The run at Weights & Biases: one for all starts of a run, by an id that ``output_dir`` keeps.

    Raises:
        ValueError: when the package is missing, or the server refuses.
    """

    def __init__(self, config: Config) -> None:
        try:
            import wandb
        except ImportError:
            raise ValueError(
                f"train.wandb_project is {config.train.wandb_project!r}, but the package wandb is not installed: "
                "pip install 'reflectron[wandb]'"
            ) from None
        try:
            self._run = wandb.init(
                project=config.train.wandb_project,
                dir=config.output_dir,
                config=dataclasses.asdict(config),
                id=wandb_run_id(config),
                resume="allow",
            )
        except wandb.Error as error:
            raise ValueError(f"train.wandb_project is {config.train.wandb_project!r}: {one_line(error)}") from error

    def log(self, values: dict[str, Any], step: int) -> None:
        """Record ``values`` of a step."""
        self._run.log(values, step=step)

    def finish(self) -> None:
        """Send what is left."""
        self._run.finish()


def wandb_run_id(config: Config) -> str:
    """Return the id in ``<output_dir>/wandb_run.json``, or write a new one there; starting over takes a new one."""
    path = Path(config.output_dir) / "wandb_run.json"
    if config.checkpoint.resume == "auto":
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            known = json.loads(path.read_bytes())
            if known["project"] == config.train.wandb_project and re.fullmatch(r"[\w-]{1,64}", known["id"]):
                return str(known["id"])
    new = secrets.token_hex(4)
    write_text(path, json.dumps({"project": config.train.wandb_project, "id": new}) + "\n")
    return new


def peak_memory_gib(groups: ParallelGroups) -> float:
    """Return the largest memory use so far among all ranks, in GiB; every rank calls it."""
    if groups.device.type == "cuda":
        used = torch.cuda.max_memory_allocated(groups.device)
    else:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.tensor(used / 2**30, device="cpu")
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=groups.hosts)
    return peak.item()
