"""Where things are: a test names no place by its own, so that it can stand anywhere."""

from __future__ import annotations

from pathlib import Path

TESTS_DIR = Path(__file__).resolve().parents[2]
ROOT = TESTS_DIR.parent


def program_path(name: str) -> str:
    """A program of this package, to be started by its path: ``-m`` would let it import from the working directory.

    In the repository's root that is fatal: transformers takes a folder ``kernels`` for a package that it can use.
    """
    return str(Path(__file__).with_name(f"{name}.py"))
