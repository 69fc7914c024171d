"""Checkpoint folders: what a manifest finds, which checkpoints are kept, and which rows a continued run keeps."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reflectron.engine.checkpoint.folder import (
    MANIFEST,
    Candidates,
    DamagedCheckpoint,
    Manifest,
    check_file,
    check_same_run,
    commit,
    digest_file,
    partial_folder,
    read_manifest,
    remove_partial,
    remove_surplus,
    saved_steps,
    set_aside,
    step_folder,
    steps_to_try,
    surplus,
    write_manifest,
)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Written beside the file that it lists."""
    (tmp_path / "tensors").write_bytes(bytes(range(256)) * 10)
    manifest = Manifest(
        step=12,
        run={"seed": 1},
        layout={"tensor_model_parallel_size": 2},
        config={"output_dir": "out"},
        versions={"torch": "2.13.0"},
        files={"tensors": digest_file(tmp_path / "tensors")},
    )
    write_manifest(tmp_path, manifest)
    return manifest


def test_a_manifest_reads_back(manifest: Manifest, tmp_path: Path) -> None:
    assert read_manifest(tmp_path) == manifest
    check_file(tmp_path / "tensors", manifest.files["tensors"])


@pytest.mark.parametrize("byte", [0, 1000, 2559])
def test_a_flipped_bit_is_found(byte: int, manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "tensors"
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=f"{path} is damaged: its SHA-256"):
        check_file(path, manifest.files["tensors"])


def test_a_cut_or_missing_file_is_found(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "tensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpoint, match=f"{path} is damaged: it has 2559 bytes, expected 2560"):
        check_file(path, manifest.files["tensors"])
    path.unlink()
    with pytest.raises(DamagedCheckpoint, match=f"{path} cannot be read: No such file"):
        check_file(path, manifest.files["tensors"])


def test_a_changed_manifest_is_found(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / MANIFEST
    text = path.read_text(encoding="utf-8")
    deep = "[" * 100_000
    for damaged in ("", "null", "[]", "12", deep, text[:-20], text.replace('"step": 12', '"step": 13')):
        path.write_text(damaged, encoding="utf-8")
        with pytest.raises(DamagedCheckpoint, match=f"{path} is damaged"):
            read_manifest(tmp_path)
    path.unlink()
    with pytest.raises(DamagedCheckpoint, match=f"{path} is missing"):
        read_manifest(tmp_path)


def write(root: Path, step: int) -> Path:
    partial = partial_folder(root, step)
    partial.mkdir(parents=True)
    (partial / "content").write_text("new", encoding="utf-8")
    return partial


def save(root: Path, *steps: int) -> None:
    for step in steps:
        commit(root, step, write(root, step))


def test_latest_moves_with_the_commit(tmp_path: Path) -> None:
    assert steps_to_try(tmp_path / "none") == Candidates(())
    save(tmp_path, 3, 6)
    write(tmp_path, 9)
    assert (tmp_path / "latest").read_text(encoding="utf-8") == "step_00000006\n"
    assert steps_to_try(tmp_path) == Candidates((6, 3))


def test_a_later_checkpoint_is_not_tried_and_is_replaced(tmp_path: Path) -> None:
    """As when the run resumed from the one before."""
    save(tmp_path, 3, 6)
    (tmp_path / "latest").write_text("step_00000003\n", encoding="utf-8")
    (step_folder(tmp_path, 6) / "old").touch()
    assert steps_to_try(tmp_path) == Candidates((3,))
    save(tmp_path, 6)
    assert [path.name for path in step_folder(tmp_path, 6).iterdir()] == ["content"]
    assert steps_to_try(tmp_path) == Candidates((6, 3))


def rewrite(path: Path, **changes: object) -> None:
    """A manifest with other entries whose checksum is right."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    del content["sha256"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"sha256": digest, **content}), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 9}, "has format version 9, expected 1"),
        ({"format_version": None}, "has format version None, expected 1"),
        ({"step": "12"}, "does not hold what a manifest does"),
        ({"step": -1}, "does not hold what a manifest does"),
        ({"files": []}, "does not hold what a manifest does"),
        ({"files": {"tensors": 1}}, "does not hold what a manifest does"),
        ({"files": {"../tensors": {"bytes": 1, "sha256": ""}}}, "leads out of the folder"),
        ({"run": None}, "does not hold what a manifest does"),
        ({"skipped": {"total": []}}, "does not hold what a manifest does"),
        ({"new": 1}, "does not hold what a manifest does"),
    ],
)
def test_a_manifest_of_another_kind_is_named(
    manifest: Manifest, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    rewrite(tmp_path / MANIFEST, **changes)
    with pytest.raises(DamagedCheckpoint, match=words):
        read_manifest(tmp_path)


def test_a_manifest_that_is_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(DamagedCheckpoint, match="cannot be read: Is a directory"):
        read_manifest(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DamagedCheckpoint, match="cannot be read: Not a directory"):
        read_manifest(tmp_path / "file")


def replace_by(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda path: path.write_text("step_000", encoding="utf-8"), "names no checkpoint ('step_000')"),
    "empty": (lambda path: path.write_text("", encoding="utf-8"), "names no checkpoint ('')"),
    "a number": (lambda path: path.write_text("12\n", encoding="utf-8"), "names no checkpoint ('12')"),
    "bytes": (lambda path: path.write_bytes(b"\xff\xfe" * 50), "names no checkpoint"),
    "large": (
        lambda path: path.write_bytes(b"step_00000006" * 10**5),
        f"names no checkpoint ('{('step_00000006' * 3)}…')",
    ),
    "escape": (lambda path: path.write_text("\x1b[2Jx", encoding="utf-8"), "names no checkpoint ('\\x1b[2Jx')"),
    "another step": (
        lambda path: path.write_text("step_00000007", encoding="utf-8"),
        "names step_00000007, which is not there",
    ),
    "folder": (replace_by(Path.mkdir), "cannot be read: Is a directory"),
    "missing": (replace_by(lambda path: None), "cannot be read: No such file or directory"),
    "loop": (replace_by(lambda path: path.symlink_to(path)), "cannot be read: Too many levels of symbolic links"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_latest_is_named_and_mended_by_the_next_save(name: str, tmp_path: Path) -> None:
    damage, words = DAMAGES[name]
    save(tmp_path, 3, 6)
    damage(tmp_path / "latest")
    found = steps_to_try(tmp_path)
    assert found.steps == (6, 3)
    assert found.note == f"{tmp_path / 'latest'} {words}; the newest intact checkpoint is taken"
    save(tmp_path, 9)
    remove_partial(tmp_path)
    assert steps_to_try(tmp_path) == Candidates((9, 6, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        *(f"step_{step:08d}" for step in (3, 6, 9)),
    ]


@pytest.mark.parametrize(
    ("steps", "keep_last", "keep_every", "expected"),
    [
        ([], 2, 0, []),
        ([10, 20], 2, 0, []),
        ([10, 20, 30, 40], 2, 0, [10, 20]),
        ([10, 20, 30, 40], 1, 20, [10, 30]),
        ([10, 20, 30, 40], 10, 0, []),
    ],
)
def test_surplus(steps: list[int], keep_last: int, keep_every: int, expected: list[int]) -> None:
    assert surplus(steps, keep_last, keep_every) == expected


def test_removal_spares_later_steps_and_takes_leftovers(tmp_path: Path) -> None:
    save(tmp_path, 3, 6, 9, 12)
    left = write(tmp_path, 15)
    remove_surplus(tmp_path, 9, keep_last=1, keep_every=0)
    assert saved_steps(tmp_path) == [9, 12]
    assert not left.exists()


FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link")


def killed_at(number: int, root: Path, action: Callable[[], None]) -> bool:
    """Run ``action`` in a process that is killed before its file operation ``number`` under ``root``; False if it ends
    before."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    seen = [0]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        # Removal of a folder works inside it, by names without a path.
        relative = event in FILE_EVENTS and isinstance(args[0], (str, Path)) and not str(args[0]).startswith("/")
        if event in FILE_EVENTS and (relative or str(args[0]).startswith(str(root))):
            seen[0] += 1
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    action()
    os._exit(0)


def test_a_save_that_is_killed_at_any_file_operation_loses_nothing(tmp_path: Path) -> None:
    """Before each of them in turn: a checkpoint of before or the new one is there, whole, and the next save works."""
    kills = 0
    while True:
        root = tmp_path / str(kills)
        save(root, 3, 6)
        # A folder of the same step, left by a run that was continued from before it.
        save(root, 9)
        (root / "latest").write_text("step_00000006\n", encoding="utf-8")

        def save_and_remove(root: Path = root) -> None:
            save(root, 9)
            remove_surplus(root, 9, keep_last=2, keep_every=0)

        killed = killed_at(kills + 1, root, save_and_remove)
        newest = steps_to_try(root).steps[0]
        assert newest in (6, 9)
        assert (step_folder(root, newest) / "content").read_text(encoding="utf-8") == "new"
        save(root, 12)
        remove_surplus(root, 12, keep_last=2, keep_every=0)
        assert steps_to_try(root).steps[0] == 12
        assert len(saved_steps(root)) == 2
        assert not [path for path in root.iterdir() if path.suffix in (".partial", ".tmp")]
        if not killed:
            break
        kills += 1
    assert kills >= 12


def test_starting_over_keeps_one_former_run(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for step in (3, 6):
        save(root, step)
        set_aside(root)
    set_aside(root)
    assert not root.exists()
    assert saved_steps(tmp_path / "checkpoints.previous") == [6]


def test_another_run_is_refused_by_its_key() -> None:
    identity = {"seed": 1, "batch.global_batch_size": 8, "loss.new": 0}
    check_same_run({"seed": 1, "batch.global_batch_size": 8, "loss.old": 1}, identity, Path("x"))
    with pytest.raises(
        ValueError, match="global_batch_size is 8, expected 512 as in the run that x holds: set it back"
    ):
        check_same_run({"seed": 1, "batch.global_batch_size": 512}, identity, Path("x"))


def test_rows_of_a_continued_run(tmp_path: Path) -> None:
    from reflectron.engine.config import Config, TrainConfig
    from reflectron.engine.training.metrics import MetricsLog, read_rows

    config = Config(output_dir=str(tmp_path), train=TrainConfig(tensorboard=False))
    lines = [json.dumps({"step": step, "loss": 0.1 * step}) + "\n" for step in range(1, 6)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(lines) + '{"step": 6, "lo', encoding="utf-8")
    (tmp_path / "validation.jsonl").write_text(lines[1] + lines[3], encoding="utf-8")
    MetricsLog(config, first_step=3).close()
    assert path.read_text(encoding="utf-8") == "".join(lines[:3])
    assert (tmp_path / "validation.jsonl").read_text(encoding="utf-8") == lines[1]
    MetricsLog(config, first_step=0).close()
    assert read_rows(path) == []
    assert (tmp_path / "metrics.previous.jsonl").read_text(encoding="utf-8") == "".join(lines[:3])
    assert (tmp_path / "validation.previous.jsonl").exists()


def test_damaged_rows_are_named_and_kept_aside(tmp_path: Path) -> None:
    from reflectron.engine.config import Config, TrainConfig
    from reflectron.engine.training.metrics import MetricsLog, read_rows

    config = Config(output_dir=str(tmp_path), train=TrainConfig(tensorboard=False))
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": step, "loss": None}).encode() for step in range(1, 6)]
    damaged = b"\n".join([rows[0], b"\x00\xff", b'{"step": "2"}', b"[]", b"[" * 10**5, rows[2], rows[4], b'{"st'])
    path.write_bytes(damaged)
    log = MetricsLog(config, first_step=3)
    log.close()
    (note,) = log.notes
    assert note.startswith(f"{path}: 4 lines ")
    assert str(tmp_path / "metrics.damaged.jsonl") in note
    assert [row["step"] for row in read_rows(path)] == [1, 3]
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == damaged


def test_a_run_is_drawn_whatever_its_rows_became(tmp_path: Path) -> None:
    from reflectron.engine.training.metrics import read_rows
    from reflectron.tools.run_log import plot_run

    damaged = ['{"step": 1}', '{"step": 2, "loss": "1"}', '{"step": 3, "kl": [1]}', '{"step": 4, "loss": NaN}']
    damaged += ['{"step": 5, "tokens_saved": 1%s}' % ("0" * 400), '{"step": 6, "loss": 1.5, "learning_rate": null}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(damaged) + "\n", encoding="utf-8")
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 4, 6]
    assert plot_run(tmp_path).exists()


@pytest.mark.parametrize("damage", ["none", "cut", "weights", "config", "folder"])
def test_a_finished_run_has_its_export(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace
    from typing import Any, cast

    from reflectron.engine.config import Config
    from reflectron.engine.training import run

    monkeypatch.setattr(run, "run_identity", lambda config, inputs: {"seed": 1})
    config, inputs = Config(output_dir=str(tmp_path)), cast(Any, SimpleNamespace())
    export = tmp_path / "export"
    export.mkdir()
    (export / "model.safetensors").write_bytes(b"weights")
    (export / "config.json").write_text("{}", encoding="utf-8")
    run.mark_finished(config, {"seed": 1}, 6)
    (export / "config.json").write_text('{"changed": "by the user"}', encoding="utf-8")
    if damage == "cut":
        (export / "model.safetensors").write_bytes(b"")
    elif damage == "folder":
        export.rename(tmp_path / "elsewhere")
    elif damage != "none":
        (export / {"weights": "model.safetensors", "config": "config.json"}[damage]).unlink()
    said = run.look_into_folder(config, inputs)
    # Without a checkpoint nothing but a training could make it again, which nobody has asked for.
    assert said is not None
    assert ("no checkpoint is left" in said) == (damage != "none")
    (tmp_path / "checkpoints" / "step_00000006").mkdir(parents=True)
    again = run.look_into_folder(config, inputs)
    assert again is None if damage != "none" else again == said
