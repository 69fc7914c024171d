"""Run the parts of a program one after the other inside a sandbox, and say how each ended.

Each line of stdin holds a part as JSON, each line of stdout its fate. The program has neither under these numbers. Its
tests are not in this process before its code has run, and a word that is asked for last is sent when its tests have
ended. What is written here can be forged by a program that was made for it. This file runs alone: it imports nothing
of the project.
"""

from __future__ import annotations

import json
import linecache
import os
import sys
import traceback
import types


def main() -> None:
    """Run parts in one namespace until there are no more."""
    parts, fates = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", 0)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    for line in parts:
        part = json.loads(line)
        said = part["word"] if "word" in part else _run(part["name"], part["code"], module)
        fates.write(json.dumps(said).encode() + b"\n")


def _run(name: str, code: str, module: types.ModuleType) -> dict[str, object]:
    """Run a part; return whether it came to its end, and what ended it."""
    # Where tracebacks and `inspect` find it.
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    module.__file__ = name
    try:
        exec(compile(code, name, "exec", dont_inherit=True), vars(module))
    except SystemExit as end:
        number = 0 if end.code is None else end.code if isinstance(end.code, int) else 1
        return {"passed": False, "reason": f"exit code {number}" if number else "ended before its tests"}
    except BaseException as error:
        traceback.print_exc()
        kind = type(error)
        known = kind.__module__ in ("builtins", "__main__")
        return {"passed": False, "reason": kind.__name__ if known else f"{kind.__module__}.{kind.__name__}"}
    return {"passed": True, "reason": ""}
