"""Modules of ours inside a sandbox: they are copied there, for the sandbox sees no editable install."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

_TOOLS = Path(__file__).parent.parent


def staged(folder: Path, module: str, *needed: str) -> list[str]:
    """Copy a module of ``reflectron.tools`` and those that it imports into ``folder``.

    Args:
        module: as ``eval.answering``; it has a function ``main``.

    Returns:
        The command that calls its ``main``, for a sandbox whose folder this is.
    """
    for name in (module, *needed):
        path = Path(*name.split(".")).with_suffix(".py")
        target = folder / "reflectron" / "tools" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_TOOLS / path, target)
        target.with_name("__init__.py").touch()
    return _command(f"reflectron.tools.{module}")


def _command(module: str) -> list[str]:
    program = f"import os, sys\nsys.path.insert(0, os.getcwd())\nfrom {module} import main\nmain()"
    return [sys.executable, "-I", "-c", program]
