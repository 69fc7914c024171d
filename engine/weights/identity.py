"""Which weights a folder holds, by their content: the same wherever the folder lies and whatever it is called.

Small checkpoints are read whole. Of large ones the headers are, and of every tensor pieces of its beginning, middle and
end: enough to tell a trained model from its base, or one release from the next, in a second rather than minutes. This
imports no torch: whether a run may begin is found before anything heavy is imported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
"""What a folder of safetensors holds: all weights in one file, or a list of the files with their tensors."""

_READ_WHOLE = 1 << 29
_PIECE = 4096
_PIECES_OF_FILE = 256
_LARGEST_HEADER = 100_000_000


def weights_identity(folder: str) -> str:
    """Return the SHA-256 over the weights in ``folder``, of either format that ``model.path`` may name.

    Raises:
        ValueError: naming a file that cannot be read.
    """
    files = _weight_files(Path(folder))
    digest = hashlib.sha256()
    try:
        whole = sum(file.stat().st_size for file in files) <= _READ_WHOLE
        for file in files:
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            with file.open("rb") as stream:
                for piece in _pieces(stream, file.stat().st_size, whole, file.suffix == ".safetensors"):
                    digest.update(piece)
    except OSError as error:
        raise ValueError(f"{error.filename or folder} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    if (folder / ".metadata").exists():
        # A device or a pipe of that name holds no weights, and has no end.
        return [folder / ".metadata", *sorted(file for file in folder.glob("*.distcp") if file.is_file())]
    try:
        names = json.loads((folder / INDEX_FILE).read_bytes())["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return [folder / SINGLE_FILE] if (folder / SINGLE_FILE).exists() else []


def _pieces(stream: IO[bytes], size: int, whole: bool, is_safetensors: bool) -> Iterator[bytes]:
    if whole:
        while block := stream.read(1 << 20):
            yield block
        return
    spans = _tensor_spans(stream, size) if is_safetensors else []
    if not spans:
        spans = [(size * i // _PIECES_OF_FILE, size * (i + 1) // _PIECES_OF_FILE) for i in range(_PIECES_OF_FILE)]
    else:
        stream.seek(0)
        yield stream.read(spans[0][0])
    for start, end in spans:
        for place in sorted({start, (start + end) // 2, max(start, end - _PIECE)}):
            stream.seek(place)
            yield stream.read(min(_PIECE, end - place))


def _tensor_spans(stream: IO[bytes], size: int) -> list[tuple[int, int]]:
    """Return where each tensor of a safetensors file lies, in their order; nothing when the header says nothing
    sensible."""
    length = int.from_bytes(stream.read(8), "little")
    if length > min(size, _LARGEST_HEADER):
        return []
    try:
        header: dict[str, Any] = json.loads(stream.read(length))
        offsets = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        return sorted((8 + length + int(start), 8 + length + int(end)) for start, end in offsets)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []
