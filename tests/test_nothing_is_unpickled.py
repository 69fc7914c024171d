"""Whatever has touched a program that a model wrote crosses as plain data: no module on that way knows pickle.

Imports are read, not made: those inside functions and for typing count, and so do the modules that they lead to.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from testkit.places import ROOT

# What reads or writes objects that name code, and what does so to hand them to other processes.
FORBIDDEN = {
    *("pickle", "_pickle", "cPickle", "pickletools", "shelve", "marshal", "copyreg", "dbm"),
    *("dill", "cloudpickle", "joblib", "jsonpickle", "yaml", "torch", "multiprocessing", "multiprocess", "ray"),
}
FORBIDDEN_NAMES = {"ProcessPoolExecutor", "read_pickle", "recv_pyobj", "send_pyobj", "allow_pickle", "loads_pickle"}
# Scripts that are copied into a sandbox, so that no import leads to them, and where scoring begins.
ENTRIES = [
    "tools/eval/score.py",
    *("tools/benchmarks/answering.py", "tools/benchmarks/comparing.py"),
    *("tools/benchmarks/candidate_process.py", "tools/benchmarks/check_process.py"),
]


def entries() -> list[Path]:
    scripts = [
        path for path in (ROOT / "tools/benchmarks").glob("*.py") if 'if __name__ == "__main__"' in path.read_text()
    ]
    return [*(ROOT / entry for entry in ENTRIES), *scripts, *(ROOT / "tools/sandbox").glob("*.py")]


def imported(path: Path) -> set[str]:
    """Full names of what a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_file(name: str) -> Path | None:
    """The file of ours behind an imported name, which may be that of something in it."""
    parts = name.split(".")
    if parts[0] != "reflectron":
        return None
    for end in (len(parts), len(parts) - 1):
        path = ROOT.joinpath(*parts[1:end])
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if end > 1 and candidate.is_file():
                return candidate
    return None


def reachable(start: list[Path]) -> dict[Path, set[str]]:
    """Modules of ours that an import leads to, with what each imports."""
    found: dict[Path, set[str]] = {}
    frontier = list(start)
    while frontier:
        path = frontier.pop()
        if path in found:
            continue
        found[path] = imported(path)
        frontier += [file for name in found[path] if (file := module_file(name)) is not None]
    return found


def names(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    found |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg}
    return found | {name.rpartition(".")[2] for name in imported(path)}


def test_no_module_that_meets_a_sample_knows_pickle() -> None:
    modules = reachable(entries())
    shown = {str(path.relative_to(ROOT)) for path in modules}
    assert {"tools/benchmarks/evalplus_judge.py", "tools/benchmarks/benchmark.py", "engine/files.py"} <= shown
    known = {path: {name.partition(".")[0] for name in imports} & FORBIDDEN for path, imports in modules.items()}
    assert {str(path): found for path, found in known.items() if found} == {}
    assert {str(path): found for path in modules if (found := names(path) & FORBIDDEN_NAMES)} == {}


@pytest.mark.parametrize("line", ["import pickle", "def f():\n    from pickle import loads", "import pickle as json"])
def test_imports_are_found_anywhere(tmp_path: Path, line: str) -> None:
    (tmp_path / "module.py").write_text(line)
    assert {name.partition(".")[0] for name in imported(tmp_path / "module.py")} & FORBIDDEN
