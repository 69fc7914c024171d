"""Files of a run that was killed, damaged in every way that disks, tools and people damage files."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reflectron.engine.checkpoint.folder import DamagedCheckpoint, check_file, read_manifest, step_folder, steps_to_try
from reflectron.engine.files import remove

Damage = Callable[[Path, random.Random], object]


def _flip_bit(path: Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def _cut_end(path: Path, generator: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: generator.randrange(len(content))])


def _zero_end(path: Path, generator: random.Random) -> None:
    content = path.read_bytes()
    kept = generator.randrange(len(content))
    path.write_bytes(content[:kept] + bytes(len(content) - kept))


def _garbage(path: Path, generator: random.Random) -> None:
    path.write_bytes(generator.randbytes(generator.randrange(1, 300)))


def _folder(path: Path, _: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _loop(path: Path, _: random.Random) -> None:
    path.unlink()
    path.symlink_to(path)


def _append_garbage(path: Path, generator: random.Random) -> None:
    lines = (b"\n", b"[]\n", b'{"step": "9"}\n', b"[" * 5000 + b"\n", b"\xff\xfe\n", b'{"step": 10')
    with path.open("ab") as stream:
        stream.write(b"".join(generator.sample(lines, 3)))


DAMAGES: dict[str, Damage] = {
    "flipped bit": _flip_bit,
    "cut end": _cut_end,
    "zeroed end": _zero_end,
    "emptied": lambda path, _: path.write_bytes(b""),
    "garbage": _garbage,
    "missing": lambda path, _: path.unlink(),
    "a folder": _folder,
    "a link to itself": _loop,
}
# What is left of these rows cannot be made again, so nothing is taken away.
_OF_ROWS: dict[str, Damage] = {"garbage lines": _append_garbage}
# The lock of a killed job: missing, or what cannot be one. (One that says nothing is waited for, see `job_lock`.)
_OF_LOCK = {name: DAMAGES[name] for name in ("missing", "a folder")}


@dataclass(frozen=True)
class Injury:
    """A file that was damaged, and what it was before."""

    path: Path
    kind: str
    """Which file of a run it is."""
    damage: str
    before: bytes

    @property
    def step(self) -> int | None:
        """The step of the checkpoint that the file belongs to."""
        name = self.path.parent.name
        return int(name.removeprefix("step_")) if name.startswith("step_") else None

    def heal(self) -> None:
        """Put the file back as it was."""
        remove(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_bytes(self.before)

    def __str__(self) -> str:
        return f"{self.path}: {self.damage}"


def newest_is_intact(checkpoints: Path) -> bool:
    """Whether there are two checkpoints to choose from, of which the newest can be used."""
    steps = steps_to_try(checkpoints).steps
    if len(steps) < 2:
        return False
    try:
        folder = step_folder(checkpoints, steps[0])
        for name, digest in read_manifest(folder).files.items():
            check_file(folder / name, digest)
    except DamagedCheckpoint:
        return False
    return True


def injure_checkpoint(checkpoints: Path, generator: random.Random, number: int) -> Injury | None:
    """Damage a file of the newest checkpoint, if the one before could take its place."""
    if not newest_is_intact(checkpoints):
        return None
    folder = step_folder(checkpoints, steps_to_try(checkpoints).steps[0])
    path = generator.choice(sorted(folder.iterdir()))
    return _injure(path, "manifest" if path.name == "manifest.json" else "checkpoint", DAMAGES, generator, number)


def injure_beside(out: Path, generator: random.Random, number: int) -> Injury | None:
    """Damage one of the other files of the run in ``out``."""
    places: list[tuple[str, list[Path], dict[str, Damage]]] = [
        ("latest", [out / "checkpoints" / "latest"], DAMAGES),
        ("token store", sorted(out.glob("token_store/*/*.arrow")), DAMAGES),
        ("rejects", sorted(out.glob("token_store/*/rejects.jsonl")), DAMAGES),
        ("metrics", [out / "metrics.jsonl"], _OF_ROWS),
        ("configuration", [out / "config.yaml"], DAMAGES),
        ("lock", [out / "job.lock"], _OF_LOCK),
        ("export", sorted(out.glob("export/*")), DAMAGES),
    ]
    there = [(kind, paths, damages) for kind, paths, damages in places if paths and all(p.is_file() for p in paths)]
    if not there:
        return None
    kind, paths, damages = there[number % len(there)]
    return _injure(generator.choice(paths), kind, damages, generator, number)


def _injure(path: Path, kind: str, damages: dict[str, Damage], generator: random.Random, number: int) -> Injury:
    before = path.read_bytes()
    names = [name for name in damages if before or name not in ("flipped bit", "cut end", "zeroed end", "emptied")]
    name = names[(number * 5 + generator.randrange(2)) % len(names)]
    damages[name](path, generator)
    if path.is_file() and path.read_bytes() == before:
        # Zeros over zeros.
        _flip_bit(path, generator)
    return Injury(path, kind, name, before)


def scatter_leftovers(out: Path) -> None:
    """Leave what killed jobs of other machines may: temporary files and folders under their unique names."""
    for name in ("checkpoints/step_00000099.node07-12-0123abcd.partial", "export.node07-12-0123abcd.partial"):
        (out / name).mkdir(parents=True, exist_ok=True)
        (out / name / "part").write_bytes(b"x")
    shutil.copyfile(out / "config.yaml", out / "config.yaml.node07-12-0123abcd.tmp")
