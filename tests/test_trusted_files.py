"""What may run code of whoever wrote a file is used nowhere but where it is written down why that is safe.

Read from the source. docs/trusted_files.md says the same for users.
"""

from __future__ import annotations

import ast
import os
from contextlib import suppress
from pathlib import Path

import pytest

from testkit.places import ROOT

FILES = [path for room in ("kernels", "engine", "tools", "examples") for path in sorted((ROOT / room).rglob("*.py"))]

MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "runpy", "imp", "zipimport"}
# Calls by the last parts of their name.
CALLS = {
    *("torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "dist_checkpointing.load"),
    *("np.load", "numpy.load", "np.fromregex", "pd.read_pickle", "pandas.read_pickle"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all"),
    *("datasets.load_dataset", "datasets.load_from_disk", "FileSystemReader", "dcp.load", "checkpoint.load"),
    *("AutoModelForCausalLM.from_pretrained", "AutoTokenizer.from_pretrained", "AutoConfig.from_pretrained"),
    *("eval", "exec", "compile", "apply_chat_template", "SourceFileLoader", "spec_from_file_location"),
}
BETWEEN_RANKS = {"gather_object", "all_gather_object", "broadcast_object_list", "scatter_object_list"}
BETWEEN_RANKS |= {"send_object_list", "recv_object_list"}

_SCRIPTS = ("answering", "candidate_process", "check_process")
# (file, what it uses) -> why no file of a stranger runs code there
ALLOWED = {
    (
        "engine/checkpoint/storage.py",
        "dist_checkpointing.load",
    ): "planning only: all reading is done by readers of ours",
    ("engine/data/sources.py", "datasets.load_dataset"): "datasets 4 and later run no loading scripts",
    ("tools/benchmarks/catalogue.py", "datasets.load_dataset"): "datasets 4 and later run no loading scripts",
    ("tools/eval/local_backends.py", "AutoModelForCausalLM.from_pretrained"): "trust_remote_code is False",
    ("tools/eval/local_backends.py", "AutoTokenizer.from_pretrained"): "trust_remote_code is False",
    (
        "tools/benchmarks/benchmark.py",
        "apply_chat_template",
    ): "transformers renders templates in jinja2's immutable sandbox",
    **{
        (f"tools/{name}.py", use): "runs inside the sandbox"
        for name in (
            "benchmarks/answering",
            "benchmarks/candidate_process",
            "benchmarks/check_process",
            "data/reflection/trial",
        )
        for use in ("exec", "compile")
    },
}


def uses(path: Path) -> set[str]:
    """What a file uses of the lists above."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").split(".")[0]} & MODULES
            # Imported by its own name, it would not be seen where it is called.
            found |= {f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in CALLS}
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found |= {call for call in CALLS if name == call or ("." in call and name.endswith(f".{call}"))}
            found |= {"apply_chat_template"} & {name.rpartition(".")[2]}
            found |= {call for call in BETWEEN_RANKS if name.rpartition(".")[2] == call}
            found |= {f"{key.arg}={ast.unparse(key.value)}" for key in node.keywords if unsafe(key)}
    return found


def unsafe(keyword: ast.keyword) -> bool:
    """An argument that has a loader run code."""
    safe = {"trust_remote_code": "False", "allow_pickle": "False", "weights_only": "True"}
    return keyword.arg in safe and ast.unparse(keyword.value) != safe[keyword.arg]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles_or_runs_a_file(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    found = uses(path)
    if name.startswith("engine/"):
        # Ranks of one run trust each other; who may connect to them is for loopback and firewalls.
        found -= BETWEEN_RANKS
    assert not {use for use in found if (name, use) not in ALLOWED}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", "pickle"),
        ("def f():\n    from pickle import loads", "pickle"),
        ("from torch import load", "torch.load"),
        ("import torch\ntorch.load(file, weights_only=True)", "torch.load"),
        ("x.load(file, weights_only=False)", "weights_only=False"),
        ("np.load(file, allow_pickle=flag)", "allow_pickle=flag"),
        ("f(trust_remote_code=True)", "trust_remote_code=True"),
        ("yaml.load(text, Loader=yaml.Loader)", "yaml.load"),
        ("exec(text)", "exec"),
        ("a.b.gather_object(x)", "gather_object"),
    ],
)
def test_the_search_finds(source: str, found: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    assert found in uses(path)


def test_safe_ways_are_not_found(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("re.compile(x)\nmodel.eval()\nyaml.safe_load(x)\njson.loads(x)\nf(trust_remote_code=False)\n")
    assert not uses(path)


def test_every_exception_is_needed() -> None:
    unused = {(name, use) for name, use in ALLOWED if not (ROOT / name).exists() or use not in uses(ROOT / name)}
    # A file that runs programs does so by either.
    assert not {name for name, _ in unused} - {name for name, _ in ALLOWED.keys() - unused}


@pytest.mark.parametrize("before", [None, "0"])
def test_transformer_engine_may_unpickle_for_a_moment_only(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from reflectron.engine.checkpoint.training_state import trusted_scales

    name = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    with suppress(KeyError), trusted_scales():
        assert os.environ[name] == "1"
        raise KeyError
    assert os.environ.get(name) == before
