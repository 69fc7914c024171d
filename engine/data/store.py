"""Turns data files into memory-mapped samples: a file is tokenised once and reused while nothing changed.

The bytes of a store depend on the data files, the tokenizer and three settings, never on the number of workers. One
process builds; the others open what it has built.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from reflectron.engine.config import DataConfig, DataFile
from reflectron.engine.data.conversation import BadRecord, Conversation
from reflectron.engine.data.shard import Shard, ShardHeader, open_shard, to_batch, write_atomically, write_shard
from reflectron.engine.data.sources import RecordChunk, read_chunks, source_identity
from reflectron.engine.data.tokenization import PARSER_VERSION, TOO_LONG, TokenizedSample, tokenize
from reflectron.engine.data.tokenizer import MAGICODER_PROMPT, TAGS, Tokenizer
from reflectron.engine.data.workers import map_chunks
from reflectron.engine.files import printable, remove_temporaries
from reflectron.engine.job_lock import lock_folder
from reflectron.engine.terminal import console

_FORMAT_VERSION = 2
_RECORDS_PER_CHUNK = 128
_LISTS = ("rejects.jsonl", "special_tokens.jsonl")


@dataclass(frozen=True)
class FileSummary:
    """What became of the records of one data file."""

    path: str
    records: int
    too_long: int
    """Records that are skipped for their length alone."""
    rejected: dict[str, int]
    """Other records that are skipped, by kind of fault, commonest first."""
    special_tokens: dict[str, int]
    """Samples whose contents spell a special token, by token, commonest first."""
    with_special_tokens: int
    """Samples whose contents spell any."""

    @classmethod
    def of(cls, path: str, records: int, reasons: Iterable[str], spelt: Sequence[Sequence[str]]) -> FileSummary:
        """Count the records of a file.

        Args:
            reasons: of all records that are skipped.
            spelt: special tokens of each sample whose contents spell any.
        """
        faults = Counter(reason.split(":")[0] for reason in reasons)
        too_long = faults.pop(TOO_LONG, 0)
        tokens = Counter(token for some in spelt for token in some)
        return cls(path, records, too_long, dict(faults.most_common()), dict(tokens.most_common()), len(spelt))

    @property
    def rejected_total(self) -> int:
        """Rejected records, without those that are too long."""
        return sum(self.rejected.values())

    @property
    def samples(self) -> int:
        """Records that are trained on."""
        return self.records - self.too_long - self.rejected_total

    def __str__(self) -> str:
        parts = [f"{self.path}: {self.samples} samples"]
        if self.too_long:
            parts.append(f"{self.too_long} too long ({self.too_long / self.records:.1%})")
        if self.rejected:
            parts.append(f"{self.rejected_total} rejected ({_counts(self.rejected)})")
        if self.special_tokens:
            tokens = _counts({printable(token): count for token, count in self.special_tokens.items()})
            parts.append(f"{self.with_special_tokens} with special tokens in their contents ({tokens})")
        return ", ".join(parts)


class TokenStore:
    """The samples of a list of data files, read from disk when asked for.

    Samples are numbered file after file, in record order, without the rejected records. The arrays of a sample are
    read-only views of the memory map.
    """

    lengths: np.ndarray
    """int32 [samples]: tokens of each sample, BOS and EOS included."""
    file_index: np.ndarray
    """int32 [samples]: number of the sample's file in the list."""
    record_index: np.ndarray
    """int32 [samples]: 0-based number of the sample's record in its file."""
    summaries: tuple[FileSummary, ...]
    """One a file."""
    fingerprint: str
    """SHA-256 over tokenizer, tags, template, length and the files' contents in their order."""

    def __init__(self, files: Sequence[DataFile], shards: Sequence[Shard]) -> None:
        self._files = [shard.file for shard in shards]
        self._batches = [batch for shard in shards for batch in shard.batches]
        self._batch_index = _numbered([len(batch.good_rows) for batch in self._batches])
        self._row = _joined([batch.good_rows for batch in self._batches])
        self.lengths = _joined([batch.lengths() for batch in self._batches])
        records = [shard.good_records() for shard in shards]
        self.file_index = _numbered([len(numbers) for numbers in records])
        self.record_index = _joined(records)
        self.summaries = tuple(_summary(file, shard) for file, shard in zip(files, shards, strict=True))
        state = [[shard.header.settings, shard.header.source.sha256] for shard in shards]
        self.fingerprint = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def check_unchanged(self) -> None:
        """Compare sizes and times with those of opening, before samples are read and once they have been used.

        Raises:
            ValueError: naming the file of the store that was changed or cut short since it was opened.
        """
        for file in self._files:
            file.check()

    def __getitem__(self, index: int) -> TokenizedSample:
        return self._batches[self._batch_index[index]].sample(int(self._row[index]))


def build_store(
    data: DataConfig, files: Sequence[DataFile], tokenizer: Tokenizer, folder: Path, progress: bool = False
) -> TokenStore:
    """Tokenise what ``folder`` does not hold yet, write the two lists of records, and open the store.

    ``folder/rejects.jsonl`` names the records that are skipped, ``folder/special_tokens.jsonl`` those whose contents
    spell special tokens.

    One process builds in a folder at a time; another one waits, and finds the work done. The lists are those of these
    files: give training and validation files a folder each.

    Args:
        progress: draw a progress bar for every file that is tokenised.

    Raises:
        ValueError: when a file cannot be read, holds no record, or more than ``data.max_reject_share`` of its records
            are rejected, or no sample is left of them all.
        OSError: when the store cannot be written; nothing unfinished is left.
    """
    with lock_folder(folder, "token store", wait=True):
        return _build_alone(data, files, tokenizer, folder, progress)


def _build_alone(
    data: DataConfig, files: Sequence[DataFile], tokenizer: Tokenizer, folder: Path, progress: bool
) -> TokenStore:
    remove_temporaries(folder)
    settings = _settings(data, tokenizer)
    job = _Job(tokenizer, data)
    shards: list[Shard] = []
    for file in files:
        path = _shard_path(folder, settings, file)
        shard = _up_to_date(path, file)
        if shard is None:
            header = ShardHeader(settings, source_identity(file))
            chunks = _with_progress(read_chunks(file, _RECORDS_PER_CHUNK), file, progress)
            write_shard(path, header, (batch for _, batch in map_chunks(job, chunks, data.workers)))
            _check_source(path, file, header)
            shard = open_shard(path, verify=False)
        shards.append(shard)
        _write_lists(folder, files, shards)
        _check_rejects(_summary(file, shard), folder / "rejects.jsonl", data.max_reject_share)
    store = TokenStore(files, shards)
    _check_too_long(store, data.max_length)
    return store


def open_store(data: DataConfig, files: Sequence[DataFile], tokenizer: Tokenizer, folder: Path) -> TokenStore:
    """Open what another process built from the same arguments; the data files themselves are not looked at.

    Raises:
        ValueError: when it was not built, or is damaged.
    """
    settings = _settings(data, tokenizer)
    try:
        return TokenStore(files, [open_shard(_shard_path(folder, settings, file), verify=False) for file in files])
    except FileNotFoundError as error:
        raise ValueError(f"token store file {error.filename} does not exist, expected it to be built before") from None


def _settings(data: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "format_version": _FORMAT_VERSION,
        "tokenizer": tokenizer.fingerprint,
        "parser": PARSER_VERSION,
        "tags": list(TAGS),
        "template": data.template,
        "prompt": {"magicoder": MAGICODER_PROMPT, "reflection": None}[data.template],
        "max_length": data.max_length,
        "special_tokens_in_content": data.special_tokens_in_content,
    }


def _shard_path(folder: Path, settings: dict[str, Any], file: DataFile) -> Path:
    """Name the shard so that runs with other settings, which keep their own, may share a folder."""
    key = json.dumps([settings, os.path.abspath(file.path), file.split, file.revision], sort_keys=True)
    stem = re.sub(r"[^\w.-]", "_", Path(file.path).stem)
    return folder / f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.arrow"


def _up_to_date(path: Path, file: DataFile) -> Shard | None:
    """Return the finished shard of ``file``; None when there is none, it is damaged, or the file's content has
    changed."""
    try:
        shard = open_shard(path, verify=True)
    except (FileNotFoundError, ValueError):
        return None
    source = source_identity(file, known=shard.header.source)
    return shard if source.sha256 == shard.header.source.sha256 else None


def _check_source(path: Path, file: DataFile, header: ShardHeader) -> None:
    """Remove a shard whose data file was changed while it was read."""
    if source_identity(file, known=header.source).sha256 != header.source.sha256:
        path.unlink()
        raise ValueError(f"data file {file.path} was changed while it was read; start again when it is complete")


@dataclass(frozen=True)
class _Job:
    """Tokenises a chunk; the same in this process and in a worker."""

    tokenizer: Tokenizer
    data: DataConfig

    def __call__(self, chunk: RecordChunk) -> pa.RecordBatch:
        results: list[TokenizedSample | BadRecord] = []
        for record in chunk.records():
            try:
                results.append(self._tokenize(record.conversation()))
            except BadRecord as error:
                results.append(error)
        return to_batch(chunk.lines, results)

    def _tokenize(self, conversation: Conversation) -> TokenizedSample:
        data = self.data
        return tokenize(conversation, self.tokenizer, data.template, data.max_length, data.special_tokens_in_content)


def _with_progress(chunks: Iterator[RecordChunk], file: DataFile, show: bool) -> Iterator[RecordChunk]:
    """Pass chunks on and draw the share of the file that has been read."""
    # Imported here: workers import this module and draw nothing.
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("tokenizing {task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[records]} records", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(), redirect_stdout=False, redirect_stderr=False, disable=not show) as bar:
        task = bar.add_task(file.path, total=1.0, records=0)
        for chunk in chunks:
            yield chunk
            bar.update(task, completed=chunk.share_read, records=chunk.first_index + len(chunk.lines))


def _summary(file: DataFile, shard: Shard) -> FileSummary:
    reasons = (reason for _, _, reason in shard.rejects())
    return FileSummary.of(file.path, shard.records, reasons, [tokens for *_, tokens in shard.special_tokens()])


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _write_lists(folder: Path, files: Sequence[DataFile], shards: Sequence[Shard]) -> None:
    """Write one JSON object for every record that is worth a look; a file that is listed twice appears once."""
    by_file = {(file.path, file.split, file.revision): shard for file, shard in zip(files, shards, strict=False)}
    rejects = [
        {"file": name, "line": line, "index": index, "reason": reason}
        for (name, *_), shard in by_file.items()
        for index, line, reason in shard.rejects()
    ]
    spelt = [
        {"file": name, "line": line, "index": index, "special_tokens": tokens}
        for (name, *_), shard in by_file.items()
        for index, line, tokens in shard.special_tokens()
    ]
    for name, rows in zip(_LISTS, (rejects, spelt), strict=True):
        lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
        write_atomically(folder / name, partial(_write_lines, lines))


def _write_lines(lines: Sequence[bytes], stream: IO[bytes]) -> None:
    stream.writelines(lines)


def _check_too_long(store: TokenStore, max_length: int) -> None:
    too_long = sum(summary.too_long for summary in store.summaries)
    if not len(store) and too_long:
        files = ", ".join(summary.path for summary in store.summaries)
        raise ValueError(
            f"data.max_length is {max_length}, expected more: no sample is left of {files}, {too_long} are longer"
        )


def _check_rejects(summary: FileSummary, rejects: Path, allowed: float) -> None:
    if summary.rejected_total > allowed * summary.records:
        fault, count = next(iter(summary.rejected.items()))
        raise ValueError(
            f"data file {summary.path}: {summary.rejected_total} of {summary.records} records are rejected, most for "
            f"{fault!r} ({count}); all reasons are in {rejects}; repair the file or raise data.max_reject_share "
            f"({allowed})"
        )


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int32), *parts])


def _numbered(counts: Sequence[int]) -> np.ndarray:
    return np.repeat(np.arange(len(counts), dtype=np.int32), counts)
