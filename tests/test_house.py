"""The tree keeps its measures, and what measures them finds what it is for."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).with_name("house.py")
LITERAL = 'from typing import Literal\nShape = Literal["line", "square", "cube"]\n'


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("house", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


house = load()


def test_the_tree_keeps_its_limits_and_every_exception_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    here = house.House.at(SCRIPT.parents[1])
    numbers, findings = house.measure(here)
    broken = {name: findings.get(name, numbers[name]) for name, limit in house.LIMITS.items() if numbers[name] > limit}
    assert broken == {}
    files = {source.path for source in here.sources if source.lines > house.FILE_LINES}
    functions = {name for lines, name in house.functions(here) if lines > house.FUNCTION_LINES}
    deliberate = list(house.DELIBERATE)
    monkeypatch.setattr(house, "DELIBERATE", {})
    found = [*house.silent_fall_throughs(here), *house.unguarded_pairs(here), *house.flow_on_words(here)]
    rooms = {(source.floor, source.room) for source in here.sources}
    assert not [room for floor, order in house.ORDER.items() for room in order if (floor, room) not in rooms]
    assert not house.LONG_FILES.keys() - files
    assert not house.LONG_FUNCTIONS.keys() - functions
    assert not [key for key in deliberate if not any(text.startswith(key) for text in found)]


def tree(root: Path, files: dict[str, str]) -> object:
    """A tree of these files, with an empty ``__init__.py`` in every folder below the floors."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if path.parent.parent != root:
            (path.parent / "__init__.py").touch()
    return house.House.at(root)


def test_a_class_name_with_two_meanings_is_found(tmp_path: Path) -> None:
    files = {
        "engine/data/a.py": "class Chunk: ...\n",
        "tools/b.py": "def f():\n    class Chunk: ...\n    class Own: ...\n",
    }
    assert house.ambiguous_classes(tree(tmp_path, files)) == ["Chunk: engine/data/a.py, tools/b.py"]


def test_a_circle_is_found_also_when_a_function_closes_it(tmp_path: Path) -> None:
    files = {
        "tools/eval/a.py": "from reflectron.tools.eval import b\n",
        "tools/eval/b.py": "from reflectron.tools.eval.c import name\n",
        "tools/eval/c.py": "def f():\n    from reflectron.tools.eval.a import name\n",
        "tools/eval/d.py": "from reflectron.tools.eval.a import name\n",
    }
    assert house.circles(tree(tmp_path, files)) == ["tools/eval/a.py <-> tools/eval/b.py <-> tools/eval/c.py"]


def test_imports_that_point_up_are_found(tmp_path: Path) -> None:
    files = {
        "kernels/a.py": "from reflectron.engine.config import Config\nimport numpy\n",
        "engine/data/a.py": "from reflectron.engine.training import step\nfrom reflectron.engine import config\n",
        "engine/files.py": "from reflectron.engine.job_lock import JobLock\n",
        "engine/odd.py": "from . import text\n",
        "tools/llm/a.py": "from reflectron.engine.training import step\nfrom reflectron.tools.cli import main\n",
    }
    small = tree(tmp_path, files)
    assert house.upward_imports(small) == [
        "kernels/a.py:1 imports engine/config/Config",
        "engine/data/a.py:1 imports engine/training/step",
        "engine/files.py:1 imports engine/job_lock/JobLock",
        "tools/llm/a.py:2 imports tools/cli/main",
    ]
    assert house.relative_imports(small) == ["engine/odd.py:1"]
    assert house.unplaced_rooms(small) == ["engine/odd: give it a place in ORDER"]
    assert house.unwanted_imports(small) == ["kernels/a.py imports numpy"]


def test_what_must_start_without_torch_is_held_to_it(tmp_path: Path) -> None:
    files = {
        "engine/config.py": "import dataclasses\nimport yaml\n",
        "engine/data/microbatch.py": "import torch\n",
        "engine/data/store.py": "import numpy\nfrom reflectron.engine.data.microbatch import pack\n",
        "engine/parallel/launch.py": "def f():\n    import torch\n",
    }
    assert house.unwanted_imports(tree(tmp_path, files)) == [
        "engine/config.py imports yaml",
        "engine/data/store.py imports microbatch",
        "engine/parallel/launch.py imports torch",
    ]


def test_an_init_in_a_floor_and_a_folder_without_are_found(tmp_path: Path) -> None:
    tree(tmp_path, {"kernels/a.py": "", "tools/eval/b.py": ""})
    (tmp_path / "kernels/__init__.py").touch()
    (tmp_path / "tools/eval/__init__.py").unlink()
    assert house.misplaced_inits(house.House.at(tmp_path)) == ["kernels", "tools/eval"]


@pytest.mark.parametrize(
    "body",
    [
        'if shape == "line":\n  return 1\nelif shape == "square":\n  return 2\nelse:\n  return 3',
        'if shape == "line":\n  return 1\nif shape == "square" and deep:\n  return 2\nreturn 3',
        'if shape == "line":\n  x = 1\nelif shape in ("square", "cube"):\n  x = 2',
        'return 1 if shape == "line" else 2 if shape == "square" else 3',
        'match shape:\n  case "line":\n    return 1\n  case "square" | "cube":\n    return 2',
        'if shape == "line":\n  return 1\nif shape == "square":\n  return 2\nassert_never(deep)',
    ],
)
def test_a_silent_fall_through_is_found(body: str, tmp_path: Path) -> None:
    found = silent(f"def f(shape: Shape, deep):\n {indented(body)}", tmp_path)
    assert found == ["tools/a.py:f: shape of cube, line, square (line 4)"]


@pytest.mark.parametrize(
    "body",
    [
        'if shape == "line":\n  return 1\nelif shape in ("square", "cube"):\n  return 2\nelse:\n  assert_never(shape)',
        'if shape == "line":\n  return 1\nelif shape == "square":\n  return 2\nassert_never(shape)',
        'if shape == "line":\n  return 1\nif shape == "square":\n  return 2\nassert_never(shape)',
        'if shape == "line":\n  x = 1\nelif shape != "square":\n  assert_never(shape)',
        'return 1 if shape == "line" else 2 if shape == "square" else assert_never(shape)',
        'match shape:\n  case "line":\n    x = 1\n  case "square":\n    x = 2\n  case _:\n    assert_never(shape)',
        'match shape:\n  case "line":\n    return 1\n  case "square" | "cube":\n    return 2\nassert_never(shape)',
        'if shape == "line":\n  return 1\nreturn 2',
        'if deep == "circle":\n  return 1\nif deep == "dot":\n  return 2\nreturn 3',
        'if shape == "line":\n  x = 1\nif shape == "square":\n  y = 2',
    ],
)
def test_a_choice_that_is_exhaustive_and_a_question_are_not(body: str, tmp_path: Path) -> None:
    assert not silent(f"def f(shape: Shape, deep):\n {indented(body)}", tmp_path)


def test_a_choice_is_known_by_a_field_an_enum_and_its_values(tmp_path: Path) -> None:
    of_field = 'if a.b.shape == "line":\n  return 1\nif a.b.shape == "cube":\n  return 2\nreturn 3'
    of_enum = "if hue is Hue.RED:\n  return 1\nelif hue is Hue.BLUE:\n  return 2"
    of_values = 'if record["shape"] == "line":\n  return 1\nif record["shape"] == "cube":\n  return 2\nreturn 3'
    source = (
        "from enum import Enum\nclass Hue(Enum):\n RED = 1\n BLUE = 2\nclass Drawing:\n shape: Shape\n"
        f"def f(a):\n {indented(of_field)}\ndef g(hue: Hue):\n {indented(of_enum)}\n"
        f"def h(record):\n {indented(of_values)}\n"
    )
    assert [text.partition(" of ")[0] for text in silent(source, tmp_path)] == [
        "tools/a.py:f: a.b.shape",
        "tools/a.py:g: hue",
        "tools/a.py:h: record['shape']",
    ]


def test_an_else_for_the_last_value_is_found(tmp_path: Path) -> None:
    source = 'Side = Literal["left", "right"]\ndef f(side: Side):\n return 1 if side == "left" else 2\n'
    source += 'def g(side: Side, deep):\n return 1 if side == "left" and deep else 2\n'
    small = tree(tmp_path, {"tools/a.py": LITERAL + source})
    assert house.unguarded_pairs(small) == ["tools/a.py:f: side of left, right (line 5)"]


def test_dispatch_on_the_ending_of_a_name_is_found(tmp_path: Path) -> None:
    source = (
        'def f(a):\n for key, value in vars(a).items():\n  if key.endswith("hidden"): ...\n'
        'def g(a):\n return [x for x in fields(a) if x.name.startswith("n_")]\n'
        'def h(path):\n return path.endswith(".py")\n'
    )
    assert house.dispatch_on_names(tree(tmp_path, {"tools/a.py": source})) == [
        "tools/a.py:f: key.endswith('hidden') (line 3)",
        "tools/a.py:g: x.name.startswith('n_') (line 5)",
    ]


def test_control_flow_on_the_words_of_a_message_is_found(tmp_path: Path) -> None:
    source = (
        'def f():\n try: ...\n except ValueError as error:\n  if "gloo" in str(error): ...\n'
        'def g(error: RuntimeError):\n text = str(error).lower()\n return text.startswith("nccl")\n'
        'def h(verdict):\n return "failed first" in verdict\n'
        'def i(name, names):\n return "gloo" in names or name.startswith("#")\n'
        'def j(error: OSError):\n return re.search("lost .* peer", str(error)) or str(error).startswith(("eof", "("))\n'
    )
    found = house.flow_on_words(tree(tmp_path, {"tools/a.py": source}))
    assert [text.partition(" (")[0] for text in found] == [
        "tools/a.py:f: gloo",
        "tools/a.py:g: nccl",
        "tools/a.py:h: failed first",
        "tools/a.py:j: lost .* peer",
        "tools/a.py:j: eof",
    ]


def test_the_script_prints_a_column_for_each_tree(tmp_path: Path) -> None:
    tree(tmp_path / "old", {"tools/a.py": "x = 1\n\n", "engine/b.py": "class A: ...\n"})
    tree(tmp_path / "new", {"tools/a.py": "class A: ...\n"})
    trees = ["--tree", str(tmp_path / "old"), "--tree", str(tmp_path / "new")]
    printed = subprocess.run(
        [sys.executable, str(SCRIPT), *trees, "--list"], capture_output=True, text=True, check=True
    ).stdout
    assert f"| product files | 2 | 1 | {house.LIMITS['product files']} |" in printed
    assert "| product lines | 3 | 1 |  |" in printed
    assert "engine/b: give it a place in ORDER" in printed


def indented(body: str) -> str:
    return body.replace("\n", "\n ")


def silent(source: str, root: Path) -> list[str]:
    return house.silent_fall_throughs(tree(root, {"tools/a.py": LITERAL + source}))
