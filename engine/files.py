"""Files that appear whole or not at all, rows that survive a kill, and others' text made fit to be shown and recorded.

Temporary names are shared by no two writers. A file of rows grows by ``append_whole``; after a kill ``end_of_rows``
tells where its last whole row ends. What ``printable`` and its kind return of a library's error, a server's reply or a
program's answer has no control characters, so it moves no cursor, sets no terminal's title and forges no second line,
and it is valid Unicode, so any file can take it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import secrets
import shutil
import socket
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass

_SHOWN_CHARACTERS = 300


def printable(text: object, most: int = _SHOWN_CHARACTERS) -> str:
    """Return ``str(text)`` on one line, with everything that is not printable escaped as Python escapes it.

    Line breaks and tabs become single spaces. Characters that reorder or hide others (bidirectional marks, zero-width
    and private ones, lone surrogates) are escaped as well, which is what ``str.isprintable`` calls not printable.

    Args:
        most: characters at most, those of the mark of a cut included.
    """
    # Cut first: escaping a reply of gigabytes would cost several times its size.
    whole = str(text)
    words = " ".join(whole[: 2 * most].split())
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in words)
    if len(shown) <= most and len(whole) <= 2 * most:
        return shown
    return shown[: most - 1] + "…"


def visible(text: str) -> str:
    """Return the text of any number of lines, with every character escaped that moves a cursor, hides or reorders
    others.

    Line ends, tabs and the spaces of other scripts stay. Lone surrogates are escaped, so that any stream can take it.
    """
    if text.isprintable():
        return text
    return "".join(char if _is_shown(char) else char.encode("unicode_escape").decode() for char in text)


def _is_shown(char: str) -> bool:
    return char.isprintable() or char in "\n\t" or unicodedata.category(char) == "Zs"


def one_line(error: BaseException) -> str:
    """Return type and first line, and the last where the first is but a place, as Triton's compiler speaks."""
    try:
        lines = str(error).strip().splitlines() or [""]
    except Exception:
        # An error whose text is no text, as model-written code raises.
        lines = [""]
    said = f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return printable(f"{type(error).__name__}: {said}")


# What `temporary_name` puts behind a name; the end tells a glob what it is.
_TEMPORARY = re.compile(r"\.[\w.-]+-\d+-[0-9a-f]{8}\.(partial|tmp)$")


def temporary_name(name: str, suffix: str = "tmp") -> str:
    """Return a name beside ``name`` that nobody else takes: with host, process and a random part."""
    host = re.sub(r"[^\w.-]", "_", socket.gethostname())
    return f"{name}.{host}-{os.getpid()}-{secrets.token_hex(4)}.{suffix}"


def remove_temporaries(folder: Path, name: str = "") -> None:
    """Delete what killed writers have left in ``folder``, of ``name`` or of everything.

    Only for one that alone may write it, but for locks: others are just trying to take them.
    """
    with contextlib.suppress(OSError):
        for found in folder.iterdir():
            if (
                found.name.startswith(name)
                and ".lock." not in found.name
                and _TEMPORARY.search(found.name[len(name) :])
            ):
                remove(found)


def remove(path: Path) -> None:
    """Delete a file, a link or a whole folder, as far as that is possible."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's entries, before returning."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_stream(path: Path) -> bool:
    """Return whether what stands there hands on what is written, as devices, pipes and ``/dev/stdout`` do."""
    folder = path.absolute().parent.resolve()
    # There names stand for what is open, a file that stdout was sent to included.
    named = folder == Path("/dev") or folder.is_relative_to("/proc")
    return named or (path.exists() and not path.is_file() and not path.is_dir())


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a stream to a temporary file beside ``path``, which is synced to the disk and only then gets its name.

    A stream, as ``/dev/stdout``, is written to and not replaced.

    Raises:
        OSError: when it cannot be written; the temporary file is gone, as after any other error.
    """
    if is_stream(path):
        with path.open("ab") as stream:
            yield stream
        return
    temporary = path.with_name(temporary_name(path.name))
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        remove(temporary)
        raise


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a file that appears whole or not at all; see ``whole_file``."""
    with whole_file(path) as stream:
        write(stream)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all; like ``write_whole``."""
    write_whole(path, lambda stream: stream.write(text.encode()))


def append_whole(descriptor: int, rows: bytes) -> None:
    """Write ``rows`` behind the end of an open file, all of them or, on a full disk, none.

    Raises:
        OSError: when they could not be written; the file is as it was.
    """
    end, rest = os.fstat(descriptor).st_size, memoryview(rows)
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except OSError:
        # The next row must not stand behind half a one.
        os.ftruncate(descriptor, end)
        raise


def end_of_rows(descriptor: int) -> int:
    """Return the bytes of an open file up to its last line end; what a killed writer left behind that is no row."""
    end = os.fstat(descriptor).st_size
    while end:
        start = max(end - (1 << 16), 0)
        if (found := os.pread(descriptor, end - start, start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal; the file is read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def free_bytes(folder: Path) -> int:
    """Return the space that is left on the disk of ``folder``, or of the nearest folder above it that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def gib(size: int) -> str:
    """Return a number of bytes as a user reads it; small ones in MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.2f} MiB"


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in ``path``.

    Raises:
        OSError: when the file cannot be read.
        ValueError: naming the file, when it is not JSON or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    # Python's parser ends at nesting beyond its stack.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {printable(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def require(*modules: str, extra: str = "data") -> None:
    """Check that packages are installed before anything is read or written.

    Raises:
        ValueError: naming the missing package and the extra that installs it.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"the package {module} is not installed: pip install 'reflectron[{extra}]'")


def installed_version(distribution: str) -> str | None:
    """Return the version of a distribution, or None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
