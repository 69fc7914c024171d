"""``reflectron train`` stopped in every way and started again: the run that results is the one that never stopped.

Every start of the command imports for seconds, so a stopped run is copied for all that can become of it, and the kills
at random moments are those of ``tests/drills/faults.py``, which forks its ranks.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from reflectron.tools.bench.harness import write_tiny_run
from testkit.places import TESTS_DIR

# 48 samples an epoch and 8 a step: epochs end after steps 6 and 12.
STEPS, SAVE_EVERY = 17, 3
ONE = ["parallel.data_parallel_size=1"]
TP2 = [*ONE, "parallel.tensor_model_parallel_size=2"]
OF_THE_MACHINE = ("step_time_ms", "data_wait_ms", "tokens_per_second", "peak_memory_gib")
REQUEUE = 85


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration of a tiny run of two replicas."""
    return write_tiny_run(tmp_path_factory.mktemp("tiny"))


class Run:
    """A run in a folder, started as often as needed."""

    def __init__(self, config: Path, folder: Path, *overrides: str) -> None:
        self.config, self.folder, self.checkpoints = config, folder, folder / "checkpoints"
        # A rate at which rounding does not grow from step to step.
        settings = ["optimizer.learning_rate=1e-3", f"train.steps={STEPS}", f"checkpoint.save_every={SAVE_EVERY}"]
        words = ["train", str(config), *settings, f"output_dir={folder}", *overrides]
        self.words = [sys.executable, "-m", "reflectron.tools.cli", *words]

    def copy(self, folder: Path, *overrides: str) -> Run:
        """The same run elsewhere, to resume in another way."""
        shutil.copytree(self.folder, folder)
        return Run(self.config, folder, *overrides)

    def start(self, *overrides: str, limit: Callable[[], None] | None = None) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen([*self.words, *overrides], stdout=pipe, stderr=pipe, text=True, preexec_fn=limit)

    def finish(self, *overrides: str, code: int = 0, limit: Callable[[], None] | None = None) -> str:
        """Run to the end; what it printed."""
        with self.start(*overrides, limit=limit) as process:
            stdout, stderr = process.communicate(timeout=180)
        assert process.returncode == code, stderr
        return stdout + stderr

    def interrupt(self, after: str, number: int) -> tuple[int, str]:
        """Signal the command once it has printed a line that begins with ``after``; its exit code and output."""
        with self.start() as process:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith(after):
                    process.send_signal(number)
                    break
            # The pipe ends when the last process that writes into it is gone.
            lines += process.stdout.readlines()
        return process.returncode, "".join(lines)

    def latest(self) -> int:
        """Step of the latest checkpoint."""
        return int((self.checkpoints / "latest").read_text(encoding="utf-8").strip().removeprefix("step_"))

    def steps(self) -> list[int]:
        """Steps of the checkpoints."""
        return [int(name.removeprefix("step_")) for name in self.saved() if name.startswith("step_")]

    def rows(self) -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return [{key: value for key, value in row.items() if key not in OF_THE_MACHINE} for row in rows]

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "export" / "model.safetensors")

    def saved(self) -> list[str]:
        return sorted(path.name for path in self.checkpoints.iterdir())


def assert_same(run: Run, expected: Run) -> None:
    """Bitwise, but for times and memory."""
    assert run.rows() == expected.rows()
    weights, expected_weights = run.weights(), expected.weights()
    assert weights.keys() == expected_weights.keys()
    for name, weight in expected_weights.items():
        assert torch.equal(weights[name], weight), name


def assert_close(run: Run, expected: Run, tolerance: float) -> None:
    """Within a relative ``tolerance``."""
    rows, expected_rows = run.rows(), expected.rows()
    assert len(rows) == len(expected_rows)
    for row, expected_row in zip(rows, expected_rows, strict=True):
        # Packing is the layout's, and a term without rows is null.
        compared = {key for key, value in expected_row.items() if value is not None} - {"pack_fill"}
        assert {key: row[key] for key in compared} == pytest.approx(
            {key: expected_row[key] for key in compared}, rel=tolerance, abs=tolerance
        )


@pytest.fixture(scope="module")
def unstopped(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One rank, never stopped."""
    keeping = ("checkpoint.save_every=2", "checkpoint.keep_last=2", "checkpoint.keep_every=6")
    run = Run(config, tmp_path_factory.mktemp("unstopped"), *ONE, *keeping)
    run.finish()
    return run


@pytest.fixture(scope="module")
def stopped(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One rank, stopped by SIGTERM when it had saved several times."""
    run = Run(config, tmp_path_factory.mktemp("stopped"), *ONE, "checkpoint.keep_last=3")
    assert run.interrupt("step 10/", signal.SIGTERM)[0] == REQUEUE
    return run


@pytest.fixture(scope="module")
def unstopped_tp2(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two tensor-parallel ranks, never stopped."""
    run = Run(config, tmp_path_factory.mktemp("unstopped_tp2"), *TP2)
    run.finish()
    return run


@pytest.fixture(scope="module", params=[signal.SIGTERM, signal.SIGUSR1])
def stopped_tp2(request: pytest.FixtureRequest, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two tensor-parallel ranks, stopped by each of the signals."""
    run = Run(config, tmp_path_factory.mktemp("stopped_tp2"), *TP2)
    code, output = run.interrupt("step 4/", request.param)
    assert code == REQUEUE
    # The signal reached it in step 4 or the next ones, which are not multiples of save_every alone.
    assert 4 <= run.latest() < STEPS
    assert [row["step"] for row in run.rows()] == list(range(1, run.latest() + 1))
    assert f"stopped by a signal; the same command resumes the run (exit code {REQUEUE})" in output
    assert "failed first" not in output
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "overrides"),
    [
        (0, ONE),
        (1, [*ONE, "checkpoint.asynchronous=true"]),
        (2, TP2),
        (3, [*ONE, "optimizer.name=adafactor", "optimizer.clip_grad_norm=0.5"]),
        (4, ["model.dtype=bfloat16"]),
    ],
    ids=["adamw", "asynchronous", "tp2", "adafactor", "dp2-bfloat16"],
)
def test_a_killed_run_resumes_as_if_nothing_had_been(config: Path, seed: int, overrides: list[str]) -> None:
    """SIGKILL at random moments, several times over."""
    drill = TESTS_DIR / "drills" / "faults.py"
    words = [str(config), f"train.steps={STEPS}", *overrides, "--kills", "3", "--injuries", "0", "--seed", str(seed)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(drill), *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "faults 3, losses 0\n" in done.stdout


@pytest.mark.slow
def test_it_resumes_after_a_signal(stopped_tp2: Run, unstopped_tp2: Run, tmp_path: Path) -> None:
    run = stopped_tp2.copy(tmp_path / "run", *TP2)
    step = run.latest()
    manifest = run.checkpoints / f"step_{step:08d}" / "manifest.json"
    assert json.loads(manifest.read_text(encoding="utf-8"))["backends"]["attention"] == "sdpa"
    assert f"resuming after step {step} from {run.checkpoints}/step_{step:08d}\n" in run.finish()
    assert_same(run, unstopped_tp2)


@pytest.mark.slow
@pytest.mark.parametrize("stopped_tp2", [signal.SIGTERM], indirect=True)
@pytest.mark.parametrize(
    "overrides",
    # The attention it would take anyway, asked for by name.
    [
        [*ONE, "backends.attention=sdpa"],
        [*ONE, "parallel.pipeline_model_parallel_size=2"],
        ["parallel.data_parallel_size=2"],
    ],
    ids=["1", "pp2", "dp2"],
)
def test_another_layout_resumes(stopped_tp2: Run, unstopped_tp2: Run, tmp_path: Path, overrides: list[str]) -> None:
    run = stopped_tp2.copy(tmp_path / "run", *overrides)
    run.finish()
    assert_close(run, unstopped_tp2, 1e-4)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(stopped: Run, unstopped: Run, tmp_path: Path) -> None:
    run = stopped.copy(tmp_path / "run", *ONE, "checkpoint.keep_last=3")
    last, middle, first = sorted(run.steps(), reverse=True)
    truncated = run.checkpoints / f"step_{last:08d}" / "__0_0.distcp"
    os.truncate(truncated, truncated.stat().st_size - 1)
    flipped = run.checkpoints / f"step_{middle:08d}" / "__0_0.distcp"
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 4
    flipped.write_bytes(content)
    output = run.finish()
    assert f"{truncated} is damaged: it has {len(content) - 1} bytes, expected " in output
    assert f"{flipped} is damaged: its SHA-256 is not the one in manifest.json; the checkpoint before it" in output
    assert f"resuming after step {first} from " in output
    assert_same(run, unstopped)


@pytest.mark.slow
def test_only_damaged_checkpoints_are_refused(stopped: Run, tmp_path: Path) -> None:
    run = stopped.copy(tmp_path / "run", *ONE)
    for step in run.steps():
        (run.checkpoints / f"step_{step:08d}" / "manifest.json").unlink()
    output = run.finish(code=2)
    assert f"{run.checkpoints} holds no intact checkpoint (" in output
    assert (
        "manifest.json is missing): restore a file that is named, or start over with checkpoint.resume=never" in output
    )


@pytest.mark.slow
def test_training_continues_when_the_disk_is_full(stopped: Run, unstopped: Run, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the end of the disk: the export still fits, a checkpoint does not."""
    run = stopped.copy(tmp_path / "run", *ONE, "checkpoint.save_every=2")
    before = run.saved()
    # A checkpoint holds the weights and two moments of each; the plot needs room, too.
    (file,) = (unstopped.checkpoints / unstopped.saved()[-1]).glob("*.distcp")
    limit = file.stat().st_size * 9 // 10
    output = run.finish(limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    failures = [line for line in output.splitlines() if "training continues: rank 0: File too large" in line]
    assert len(failures) >= 2
    assert run.saved() == before
    assert_same(run, unstopped)


@pytest.mark.slow
def test_which_checkpoints_are_kept(unstopped: Run) -> None:
    assert unstopped.saved() == ["latest", *(f"step_{step:08d}" for step in (6, 12, 16, 17))]


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(unstopped: Run, tmp_path: Path) -> None:
    run = unstopped.copy(tmp_path / "run", *ONE)
    metrics = (run.folder / "metrics.jsonl").read_bytes()
    line = "{}: this run finished after step {}; checkpoint.resume=never trains it again\n"
    assert line.format(run.folder, STEPS) in run.finish()
    weights = run.folder / "export" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    assert "all steps are done; exporting" in run.finish()
    assert weights.read_bytes() == whole
    refusal = f"seed is 1, expected 3407 as in the run that {run.folder / 'finished.json'} holds: set it back"
    assert refusal in run.finish("seed=1", code=2)
    assert (run.folder / "metrics.jsonl").read_bytes() == metrics
    run.finish("seed=1", "train.steps=2", "checkpoint.resume=never")
    assert (run.folder / "metrics.previous.jsonl").read_bytes() == metrics
    assert (run.folder / "checkpoints.previous" / "step_00000012").is_dir()
    assert len(run.rows()) == 2
    assert line.format(run.folder, 2) in run.finish("seed=1", "train.steps=2")


@pytest.mark.slow
def test_another_run_in_the_folder_is_refused(stopped: Run) -> None:
    before = stopped.saved()
    output = stopped.finish("batch.global_batch_size=7", code=2)
    assert "batch.global_batch_size is 7, expected 8 as in the run that" in output
    assert "or start over with checkpoint.resume=never" in output
    assert stopped.saved() == before
