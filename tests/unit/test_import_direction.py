"""Imports only point down: tools -> engine -> kernels, and inside engine along the data's way. Read from the source."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("kernels", "engine", "tools")

# Each room of engine may import itself, its own level and the levels above it in this list.
ENGINE_LEVELS = (
    {"config", "choices", "text", "terminal", "files"},
    {"job_lock"},
    {"data"},
    {"parallel"},
    {"model", "backends"},
    {"preparation"},
    {"loss", "optimizer", "adafactor", "lr_schedule", "checkpoint", "flops", "metrics", "spikes"},
    {"train_step", "sample_loss"},
    {"validation", "nonfinite"},
    {"trainer"},
)
LEVEL_OF = {room: level for level, rooms in enumerate(ENGINE_LEVELS) for room in rooms}

# Where arrays become tensors; every other file of engine/data is imported by tokenising workers, which must start fast.
DATA_WITH_TORCH = {"microbatch", "context_split", "global_batch"}


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere in it, those of ``from a import b`` as ``a.b``."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno}: relative import, write reflectron...."
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def of_this_project(path: Path) -> set[tuple[str, ...]]:
    """Imports of this project as (room, module, ...)."""
    return {tuple(name.split(".")[1:]) for name in imported(path) if name.split(".")[0] == "reflectron"}


def foreign(path: Path) -> set[str]:
    """Top-level names that come neither from this project nor from the standard library."""
    return {name.split(".")[0] for name in imported(path)} - {"reflectron"} - set(sys.stdlib_module_names)


def test_there_is_something_to_check() -> None:
    assert all(sources(room) for room in ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_itself_and_those_below(room: str) -> None:
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    wrong = {
        str(path.relative_to(ROOT)): names
        for path in sources(room)
        if (names := of_this_project(path)) and not {name[0] for name in names} <= allowed
    }
    assert not wrong


@pytest.mark.parametrize("path", sources("engine"), ids=lambda path: str(path.relative_to(ROOT)))
def test_engine_imports_follow_the_data(path: Path) -> None:
    own = path.relative_to(ROOT / "engine").parts[0].removesuffix(".py")
    used = {name[1] for name in of_this_project(path) if name[0] == "engine"}
    unplaced = (used | {own}) - LEVEL_OF.keys()
    assert not unplaced, f"give {unplaced} of engine a place in ENGINE_LEVELS"
    later = {room for room in used if LEVEL_OF[room] > LEVEL_OF[own]}
    assert not later, f"{path.relative_to(ROOT)} imports what comes later: {later}"


@pytest.mark.parametrize("path", sources("kernels"), ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_need_torch_and_triton_only(path: Path) -> None:
    assert foreign(path) <= {"torch", "triton"}


def test_config_needs_the_standard_library_only() -> None:
    path = ROOT / "engine" / "config.py"
    assert not foreign(path)
    assert not of_this_project(path)


@pytest.mark.parametrize(
    "path",
    [path for path in sources("engine/data") if path.stem not in DATA_WITH_TORCH]
    + [ROOT / "engine/parallel/launch.py"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_workers_and_launcher_start_without_torch(path: Path) -> None:
    assert not foreign(path) & {"torch", "megatron"}
    assert not {name[2] for name in of_this_project(path) if name[:2] == ("engine", "data")} & DATA_WITH_TORCH


def test_rooms_are_namespaces_and_their_folders_packages() -> None:
    # A top-level folder `kernels` with an __init__.py would shadow the package of that name that transformers imports.
    for room in ROOMS:
        assert not (ROOT / room / "__init__.py").exists()
        folders = {path.parent for path in sources(room)} - {ROOT / room}
        assert all((folder / "__init__.py").exists() for folder in folders)
