"""A disk that is full during saves, and a token store that is cut short while a run reads it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from reflectron.engine.model.inputs import read_model_inputs
from reflectron.engine.weights.hf_folder import checkpoint_bytes
from reflectron.tools.bench.harness import write_tiny_run
from reflectron.tools.load_config import load_config
from testkit.printed_lines import lines_to

STEPS = 60


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small tmpfs")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "reflectron-test", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def start(config: Path, output_dir: Path, *overrides: str) -> subprocess.Popen[str]:
    words = ["train", str(config), f"output_dir={output_dir}", "parallel.data_parallel_size=1", f"train.steps={STEPS}"]
    command = [sys.executable, "-m", "reflectron.tools.cli", *words, *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_training_continues_and_saves_again_when_there_is_room(small_disk: Path, tmp_path: Path) -> None:
    output_dir = small_disk / "run"
    checkpoints = output_dir / "checkpoints"
    config = write_tiny_run(tmp_path)
    with start(config, output_dir, "checkpoint.save_every=0") as process:
        lines_to(process, f"step 3/{STEPS}")
        process.send_signal(signal.SIGTERM)
        lines_to(process, "stopped by a signal")
    (older,) = (path for path in checkpoints.iterdir() if path.is_dir())
    content = {path.name: path.read_bytes() for path in older.iterdir()}
    (latest,) = (checkpoints / "latest").read_text(encoding="utf-8").split()
    filler = small_disk / "filler"
    # A checkpoint needs half a MiB and one to spare.
    filler.write_bytes(bytes(free(small_disk) - (1 << 20)))
    with start(config, output_dir) as process:
        assert process.stdout is not None
        refused = process.stdout.read()
    assert process.returncode == 2
    needed = (
        r"\d\.\d\d MiB for a checkpoint and \d\.\d\d MiB for the export, and \d\.\d\d MiB are free on its disk: make"
    )
    assert re.search(rf"reflectron train: error: {output_dir} needs {needed} room", refused)
    filler.unlink()
    # The disk must be full before the first save, however slow this process is; the last step saves again.
    with start(config, output_dir, f"checkpoint.save_every={STEPS - 10}") as process:
        lines_to(process, "resuming after step")
        filler.write_bytes(bytes(free(small_disk) - (1 << 20)))
        failure = lines_to(process, "could not be written, training continues")[-1]
        assert "are free on the disk of" in failure
        assert {path.name: path.read_bytes() for path in older.iterdir()} == content
        assert (checkpoints / "latest").read_text(encoding="utf-8").split() == [latest]
        assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", older.name]
        filler.unlink()
        lines_to(process, "checkpoint  ")
        assert process.stdout is not None
        process.stdout.read()
    assert process.returncode == 0
    assert (checkpoints / "latest").read_text(encoding="utf-8") == f"step_{STEPS:08d}\n"


@pytest.mark.slow
def test_an_export_that_finds_no_room_is_made_by_the_same_command(small_disk: Path, tmp_path: Path) -> None:
    """Nothing is trained or tokenised again."""
    output_dir, config = small_disk / "run", write_tiny_run(tmp_path)
    filler, words = small_disk / "filler", ("checkpoint.save_every=0", f"train.steps={STEPS}")
    with start(config, output_dir, *words) as process:
        lines_to(process, f"step 3/{STEPS}")
        # The one checkpoint fits, with the MiB that it spares; and then the export does not, which spares one as well.
        run = load_config(str(config), [])
        needed = checkpoint_bytes(run, read_model_inputs(run).arch)
        filler.write_bytes(bytes(free(small_disk) - needed - (96 << 10)))
        lines_to(process, f"checkpoint  {output_dir}/checkpoints/step_{STEPS:08d} ")
        assert process.stdout is not None
        said = process.stdout.read()
    assert process.returncode == 2, said
    (error,) = (line for line in said.splitlines() if "error:" in line)
    assert error.startswith("reflectron train: error: the export could not be written: ")
    kept = f"steps 1-{STEPS} are kept in {output_dir}/checkpoints/step_{STEPS:08d}: make room, and the same command "
    assert kept in error
    assert "Traceback" not in said
    assert not list(output_dir.glob("export*"))
    before = {path: path.stat().st_mtime_ns for path in output_dir.rglob("*.arrow")}
    rows = (output_dir / "metrics.jsonl").read_bytes()
    filler.unlink()
    with start(config, output_dir, *words) as process:
        assert process.stdout is not None
        said = process.stdout.read()
    assert process.returncode == 0, said
    assert f"resuming after step {STEPS} from " in said
    assert "all steps are done; exporting\n" in said
    assert f"step {STEPS}/{STEPS}" not in said
    assert (output_dir / "metrics.jsonl").read_bytes() == rows
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (output_dir / "export" / "model.safetensors").exists()
    assert (output_dir / "finished.json").exists()


def free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


@pytest.mark.slow
def test_a_token_store_that_is_cut_short_is_named(tmp_path: Path) -> None:
    config = write_tiny_run(tmp_path)
    with start(config, tmp_path / "run", "train.steps=100000") as process:
        lines_to(process, "step 1/")
        (store,) = (tmp_path / "run" / "token_store" / "train").glob("*.arrow")
        size = store.stat().st_size
        os.truncate(store, size // 2)
        assert process.stdout is not None
        said = process.stdout.read()
    # Cut in the very moment of reading, the memory is gone before anyone can look at the file's size.
    if "killed by SIGBUS" in said:
        assert "as when a file that is mapped into memory was cut short (token store, weights)" in said
        assert process.returncode == 128 + signal.SIGBUS
    else:
        assert f"token store file {store} was changed under the run: it has {size // 2} bytes, expected {size}" in said
        assert process.returncode == 2
