"""Read the texts of records of any schema, and write what becomes of the records.

A text is a string anywhere in a record: a column, or a leaf of a nested one such as ``messages[1].content[0].content``.
So raw code, conversations and problem-solution pairs are read alike, and a match can name its exact position.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from reflectron.engine.config import DataFile
from reflectron.engine.data.conversation import BadRecord
from reflectron.engine.data.conversation import checked_text as storable_text
from reflectron.engine.data.sources import Record
from reflectron.engine.files import whole_file

# Names of a conversation's structure, not of its content.
_STRUCTURE = ("role", "type")
_WORD = re.compile(r"\w+")
_DATA_SUFFIX = re.compile(r"(?<=.)(\.\w+)?\.(gz|zst|bz2|xz)$|(?<=.)\.\w+$")


@dataclass(frozen=True)
class RecordText:
    """One string of a record."""

    field: str
    """Its place: ``solution``, ``messages[1].content[0].content``."""
    value: str


def texts(record: Record, columns: Sequence[str]) -> list[RecordText]:
    """Return the strings of a record that hold a word, in their order.

    Args:
        columns: only these; all when empty.

    Raises:
        BadRecord: when the record is not readable or has no such string.
    """
    row = record.decoded()
    if not isinstance(row, dict):
        raise BadRecord(f"not an object: found {type(row).__name__}, expected named columns")
    chosen = {name: row[name] for name in columns if name in row} if columns else row
    found = [text for text in _leaves(chosen, "") if _WORD.search(text.value)]
    if not found:
        raise BadRecord(f"no text: found columns {', '.join(map(str, row)) or 'none'}")
    for text in found:
        storable_text(text.value, text.field)
    return found


def fault_kind(reason: str) -> str:
    """Return the kind of fault under which a ``BadRecord`` is counted: its reason up to the colon."""
    return reason.partition(":")[0]


def _leaves(value: object, path: str) -> Iterator[RecordText]:
    if isinstance(value, str):
        yield RecordText(path, value)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name not in _STRUCTURE:
                yield from _leaves(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{path}[{number}]")


def lowered(text: str) -> str:
    """Lower a text, character by character, so that every offset stays what it was."""
    lower = text.lower()
    if len(lower) == len(text):
        return lower
    return "".join(c if len(c.lower()) > 1 else c.lower() for c in text)


def words(text: str) -> list[str]:
    """Return runs of letters, digits and underscores, in lower case."""
    return _WORD.findall(lowered(text))


def word_spans(text: str) -> list[tuple[int, int]]:
    """Return start and end of each of ``words`` in ``text``."""
    return [match.span() for match in _WORD.finditer(lowered(text))]


def word_hash(word: str) -> int:
    """Return a hash of 64 bits that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def squeezed(text: str) -> str:
    """Lower a text, with every run of whitespace as one space, and none at the ends."""
    return " ".join(lowered(text).split())


def as_line(record: Record) -> bytes:
    """Return the record as a line of JSON: the very bytes that were read, but for line breaks between them."""
    if isinstance(record.value, bytes):
        return b" ".join(record.value.splitlines()) + b"\n"
    row = {"unreadable": str(record.value)} if isinstance(record.value, BadRecord) else record.value
    return json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"


def data_files(paths: Sequence[str], split: str) -> dict[str, DataFile]:
    """Name the files to read by what their outputs will be called.

    Raises:
        ValueError: when two would share a name.
    """
    files: dict[str, DataFile] = {}
    for path in paths:
        name = re.sub(r"[^\w.-]", "_", _DATA_SUFFIX.sub("", Path(path).name) if Path(path).is_file() else path)
        if name in files:
            raise ValueError(f"{path} and {files[name].path} would both be written as {name}.jsonl; rename one of them")
        files[name] = DataFile(path=path, split=split)
    return files


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file in a folder that is made; it appears when it is complete, and not at all after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as stream:
        yield stream


def write_row(stream: IO[bytes], row: object) -> None:
    """Append one line of JSON."""
    try:
        line = json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        # A model's answer may hold half of a surrogate pair, which only an escape can spell.
        line = json.dumps(row).encode()
    stream.write(line + b"\n")
