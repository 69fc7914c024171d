"""The configuration reference: from the source of ``engine/config.py`` to ``docs/configuration.md``.

Types and defaults come from the dataclasses, meanings from the docstring under each field, so the page cannot say
anything that the code does not. A test compares the page with ``config_reference()``; rewrite it with
``python docs/config_reference.py > docs/configuration.md``.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

from reflectron.engine import config as config_module
from reflectron.engine.config import Config
from reflectron.tools.load_config import describe

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_HEADER = """# Configuration

Every key of a run's YAML file, its type, its default and its meaning. On the command line a key is written with dots:
`reflectron train run.yaml optimizer.learning_rate=1e-4 'data.train[0].path=mine.jsonl'`. A relative path starts at the
working directory. `reflectron train run.yaml --show-config` prints the resolved configuration.

Written from `engine/config.py` by `python docs/config_reference.py > docs/configuration.md`.
"""


def config_reference() -> str:
    """Return the whole page as Markdown, ending in a newline."""
    meanings = _field_docstrings()
    hints = get_type_hints(Config)
    top = [field for field in dataclasses.fields(Config) if not dataclasses.is_dataclass(hints[field.name])]
    parts = [_HEADER, "## Top level\n", _table(Config, top, "", meanings)]
    for name, section in hints.items():
        if dataclasses.is_dataclass(section):
            assert isinstance(section, type)
            parts += [f"## {name}\n", f"{section.__doc__}\n"]
            parts += [_table(section, dataclasses.fields(section), name, meanings)]
            for key, item in _lists_of_sections(section, name):
                parts += [f"### Each element of {key}\n", f"{item.__doc__}\n"]
                parts += [_table(item, dataclasses.fields(item), f"{key}[i]", meanings)]
    return "\n".join(parts)


def _lists_of_sections(section: type[DataclassInstance], name: str) -> list[tuple[str, type[DataclassInstance]]]:
    """Return the lists whose elements have keys, each element type once, under the first key that holds it."""
    found: dict[type[DataclassInstance], str] = {}
    for field, annotation in get_type_hints(section).items():
        if get_origin(annotation) is tuple and dataclasses.is_dataclass(get_args(annotation)[0]):
            found.setdefault(get_args(annotation)[0], f"{name}.{field}")
    return [(key, item) for item, key in found.items()]


def _table(cls: type[DataclassInstance], fields: Any, prefix: str, meanings: dict[tuple[str, str], str]) -> str:
    hints = get_type_hints(cls)
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field in fields:
        key = f"{prefix}.{field.name}" if prefix else field.name
        meaning = meanings[cls.__name__, field.name].replace("``", "`")
        cells = [f"`{key}`", describe(hints[field.name]), _default(field), meaning]
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _default(field: dataclasses.Field[Any]) -> str:
    """Return the default as YAML spells it."""
    if field.default is dataclasses.MISSING:
        return "required"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return "`" + OmegaConf.to_yaml({"value": value}).removeprefix("value: ").strip() + "`"


def _field_docstrings() -> dict[tuple[str, str], str]:
    """Return the string under each field, on one line, by class name and field name."""
    found = {}
    for cls in ast.parse(inspect.getsource(config_module)).body:
        if isinstance(cls, ast.ClassDef):
            for statement, following in zip(cls.body, cls.body[1:], strict=False):
                if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                    assert isinstance(statement.target, ast.Name)
                    found[cls.name, statement.target.id] = " ".join(ast.literal_eval(following.value).split())
    return found


if __name__ == "__main__":
    print(config_reference(), end="")
