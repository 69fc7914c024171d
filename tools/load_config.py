"""From a YAML file and dotted overrides to one frozen ``Config``, and back to YAML.

Every key of the Config was known and every value had the declared type. OmegaConf parses and merges; the conversion
into dataclasses is here, because its messages are what a user reads: every error is a ``ValueError`` of one line that
names the key, where it was written and the fix. Paths in the file stay as written, relative to the working directory.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from reflectron.engine.config import Config
from reflectron.engine.files import one_line

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from _typeshed import DataclassInstance

    Section = TypeVar("Section", bound=DataclassInstance)

COMMAND_LINE = "command line"


def add_config_arguments(parser: ArgumentParser) -> None:
    """Declare ``config`` and ``overrides``, the two arguments of ``load_config``, for a subcommand."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    wins = "settings that win over CONFIG, e.g. optimizer.learning_rate=1e-4"
    parser.add_argument("overrides", metavar="key=value", nargs="*", help=wins)


def load_config(path: str, overrides: list[str]) -> Config:
    """Read ``path``, apply ``key=value`` words in their order, and build the Config.

    List elements are spelled as in ``data.train[0].path=mine.jsonl``; a value is parsed as YAML, so ``null``, ``true``
    and ``[2, 1]`` mean what they mean in the file.

    Raises:
        ValueError: one line; for a key or a type it starts with the file's name or ``command line``.
        OSError: the file cannot be read.
    """
    tree = _read_file(path)
    for override in overrides:
        _apply_override(tree, override)
    return _ConfigReader(path, overrides).section(Config, OmegaConf.to_container(tree, resolve=False), "")


def config_from(tree: dict[str, Any], source: str) -> Config:
    """Return the Config whose ``dataclasses.asdict`` is ``tree``; ``source`` names it in errors.

    Raises:
        ValueError: for a key or a type that this version does not know.
    """
    return _ConfigReader(source, []).section(Config, tree, "")


def to_yaml(config: Config) -> str:
    """Return the whole configuration as YAML that ``load_config`` reads back to an equal Config."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def choices_of(section: type[DataclassInstance], key: str) -> tuple[str, ...]:
    """Return the values of a key, for a command-line option of the same meaning."""
    return get_args(get_type_hints(section)[key])


def describe(annotation: Any) -> str:
    """Return the YAML type of an annotation in words, e.g. ``integer or null`` for ``int | None``."""
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    if get_origin(annotation) is Literal:
        *others, last = map(str, get_args(annotation))
        return f"{', '.join(others)} or {last}" if others else last
    if get_origin(annotation) in _UNIONS:
        return " or ".join(describe(member) for member in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"list of {describe(get_args(annotation)[0])}"
    return "section"


_SCALARS: dict[Any, str] = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "text",
    type(None): "null",
}
_UNIONS = (Union, types.UnionType)


def _read_file(path: str) -> DictConfig:
    try:
        tree = OmegaConf.load(path)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: {error.problem}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text, expected YAML") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        # OmegaConf's way of saying that the YAML is a lone number or the like.
        raise ValueError(f"{path} holds no sections, expected 'data:', 'model:' and so on") from error
    except GrammarParseError as error:
        raise ValueError(f"{path}: {error.full_key} holds '${{', but {_NO_INTERPOLATION}") from error
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits, a date that is none, a thousand brackets.
        raise ValueError(f"{path} holds what no setting is: {one_line(error)}") from None
    if not isinstance(tree, DictConfig):
        raise ValueError(f"{path} holds a list, expected sections such as 'data:' and 'model:'")
    if not tree:
        raise ValueError(f"{path} is empty, expected sections such as 'data:' and 'model:'")
    for key, value in _leaves(OmegaConf.to_container(tree, resolve=False), ""):
        if isinstance(value, str) and "${" in value:
            raise ValueError(f"{path}: {key} is {value!r}, but {_NO_INTERPOLATION}")
    return tree


_NO_INTERPOLATION = "interpolation with ${...} is not supported; write the value itself"


def _apply_override(tree: DictConfig, override: str) -> None:
    key, equals, _ = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{COMMAND_LINE}: {override!r} is not an override, expected key=value")
    if "${" in override:
        raise ValueError(f"{COMMAND_LINE}: {override!r}, but {_NO_INTERPOLATION}")
    try:
        tree.merge_with_dotlist([override])
    except yaml.YAMLError as error:
        problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else " ".join(str(error).split())
        raise ValueError(f"{COMMAND_LINE}: the value of {override!r} is not YAML: {problem}") from error
    except (OmegaConfBaseException, IndexError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{COMMAND_LINE}: {override!r} cannot be set: {str(error).splitlines()[0]}") from error


def _leaves(tree: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _leaves(value, _join(key, name))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from _leaves(value, f"{key}[{index}]")
    else:
        yield key, tree


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


class _ConfigReader:
    """Converts the merged tree, and knows what was overridden, so that an error names the place to correct."""

    def __init__(self, path: str, overrides: list[str]) -> None:
        self.path = path
        self.overridden = [_parts(override.partition("=")[0]) for override in overrides]

    def section(self, cls: type[Section], tree: Any, key: str) -> Section:
        # A section whose every line is commented out parses as null, and means the defaults.
        tree = {} if tree is None else tree
        if not isinstance(tree, dict):
            raise self._type_error(key, tree, "a section")
        hints = get_type_hints(cls)
        for name in tree:
            if name not in hints:
                raise self._key_error(_join(key, name), list(hints))
        missing = [field.name for field in dataclasses.fields(cls) if _is_required(field) and field.name not in tree]
        if missing:
            raise ValueError(f"{self._source(key)}: {_join(key, missing[0])} is missing")
        return cls(**{name: self.value(hints[name], value, _join(key, name)) for name, value in tree.items()})

    def value(self, declared: Any, value: Any, key: str) -> Any:
        """Return ``value`` as the declared type; the only conversions are integer to float and list to tuple."""
        annotation = declared
        if get_origin(declared) in _UNIONS:
            if value is None:
                return None
            (annotation,) = (member for member in get_args(declared) if member is not type(None))
        origin = get_origin(annotation)
        if dataclasses.is_dataclass(annotation):
            assert isinstance(annotation, type)
            return self.section(annotation, value, key)
        if origin is tuple and isinstance(value, list):
            item = get_args(annotation)[0]
            return tuple(self.value(item, element, f"{key}[{index}]") for index, element in enumerate(value))
        if origin is Literal and isinstance(value, str) and value in get_args(annotation):
            return value
        if annotation is float and type(value) in (int, float) and math.isfinite(value):
            return float(value)
        # Exact type: to Python a bool is an int, to a user it is not.
        if annotation in (bool, int, str) and type(value) is annotation:
            return value
        raise self._type_error(key, value, describe(declared), unquoted=annotation is str)

    def _type_error(self, key: str, value: Any, expected: str, unquoted: bool = False) -> ValueError:
        hint = " (put it in quotes)" if unquoted and isinstance(value, bool | int | float) else ""
        return ValueError(f"{self._source(key)}: {key} is {_spell(value)}, expected {expected}{hint}")

    def _key_error(self, key: str, siblings: list[str]) -> ValueError:
        parent, _, name = key.rpartition(".")
        near = [_join(parent, sibling) for sibling in difflib.get_close_matches(name, siblings, n=1)]
        moved = [known for known in _keys(Config) if known.rpartition(".")[2] == name]
        fix = f"did you mean {(moved + near)[0]}?" if moved or near else f"expected one of {', '.join(siblings)}"
        return ValueError(f"{self._source(key)}: unknown key {key}; {fix}")

    def _source(self, key: str) -> str:
        parts = _parts(key)
        for other in self.overridden:
            shared = min(len(parts), len(other))
            if key and parts[:shared] == other[:shared]:
                return COMMAND_LINE
        return self.path


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _keys(cls: type[DataclassInstance], prefix: str = "") -> Iterator[str]:
    for name, annotation in get_type_hints(cls).items():
        if dataclasses.is_dataclass(annotation):
            assert isinstance(annotation, type)
            yield from _keys(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _spell(value: Any) -> str:
    """Return a value as YAML spells it, text in quotes."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def _parts(key: str) -> list[str]:
    return key.replace("[", ".").replace("]", "").split(".")
