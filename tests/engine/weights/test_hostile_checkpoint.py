"""A checkpoint folder of a stranger runs nothing, asks for no memory, and is refused in one line."""

from __future__ import annotations

import io
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from reflectron.engine.weights import dist_metadata
from reflectron.engine.weights.dist_metadata import read_metadata
from reflectron.engine.weights.inert_pickle import ForeignPickle, Made, PickleLimits, parse
from reflectron.engine.weights.torch_file import read_torch_file
from reflectron.tools import cli
from testkit.places import TESTS_DIR

GOLDEN = TESTS_DIR / "golden"
# Where every hostile command would leave a trace: in the working directory, which is the test's own.
MARK = "touch escaped"
FILE = "open('escaped', 'w').close()"


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.call


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def calls() -> dict[str, bytes]:
    """Pickles whose loading runs a command."""
    bytes_entry = {"key": BytesStorageMetadata()}
    in_plan = Metadata(bytes_entry, planner_data={"key": [(1, {"deep": Call(os.system, MARK)})]}, storage_data={})
    return {
        "system": pickle.dumps(Call(os.system, MARK)),
        "eval": pickle.dumps(Call(eval, FILE)),
        "exec": pickle.dumps(Call(exec, FILE)),
        "popen": pickle.dumps(Call(subprocess.Popen, ("touch", "escaped"))),
        "partial": pickle.dumps(Call(partial(os.system, MARK))),
        "getattr chain": pickle.dumps(Call(getattr, Call(__import__, "os"), "system")),
        "call of what was returned": b"\x80\x04" + text("os") + b"\x85cbuiltins\n__import__\nq\x00Rq\x01.",
        "in the plan": pickle.dumps(in_plan),
        "as a key": pickle.dumps({(Call(os.system, MARK),): 1}),
        "as a tensor's entry": pickle.dumps(Metadata({"key": Call(os.system, MARK)}, None, {})),  # type: ignore[dict-item]
        "as the place of a tensor": pickle.dumps(Metadata(bytes_entry, None, {"key": Call(os.system, MARK)})),
        "as a state": pickle.dumps(Call(Metadata, {}, state={"storage_data": Call(os.system, MARK)})),
        "protocol 0": pickle.dumps(Call(os.system, MARK), protocol=0),
        "protocol 1": pickle.dumps(Call(os.system, MARK), protocol=1),
        "protocol 5": pickle.dumps(Call(os.system, MARK), protocol=5),
        "newer protocol": b"\x80\x06" + pickle.dumps(Call(os.system, MARK))[2:],
        "INST": b"(" + b"S'touch escaped'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'touch escaped'\no.",
        "NEWOBJ_EX": b"\x80\x04cbuiltins\nexec\n" + text(FILE) + b"\x85}\x92.",
        "name in two texts": b"\x80\x04" + text("os") + text("system") + b"\x93" + text(MARK) + b"\x85R.",
        "name with dots": b"\x80\x04" + text("torch") + text("os.system") + b"\x93" + text(MARK) + b"\x85R.",
        "module with an allowed end": b"\x80\x04" + text("os.torch") + text("Size") + b"\x93.",
        "persistent id": b"\x80\x04" + text(MARK) + b"Q.",
        "persistent id of protocol 0": b"Ptouch escaped\n.",
        "extension": b"\x80\x04\x82\x01" + text(MARK) + b"\x85R.",
        "BUILD on a class": b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\nN}"
        + text("__setstate__")
        + b"cos\nsystem\ns\x86b"
        + text(MARK)
        + b"b.",
        "BUILD on a class, names allowed": b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\nN}"
        + text("__setstate__")
        + b"ctorch\nSize\ns\x86b.",
        "call of an allowed class's attribute": b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata.__init__\n.",
        "NEXT_BUFFER": b"\x80\x05\x97.",
        "code encoded": pickle.dumps(Call(eval, Call(__import__("codecs").encode, FILE, "rot13"))),
    }


def bombs() -> dict[str, bytes]:
    """Pickles that take memory or time, are cut short, or hold something else."""
    whole = pickle.dumps(Metadata({"key": BytesStorageMetadata()}, None, {}))
    laughs = b"\x80\x04]q\x00" + b"".join(b"]" + b"h\x00" * 0 + b"(h%ch%ceq%c" % (i, i, i + 1) for i in range(200))
    tuples = b"\x80\x04}N" + b"".join(b"q\x01h\x01\x86" for _ in range(200)) + b"Ns."
    return {
        "nothing": b"",
        "a dot": b".",
        "text": b"hello, world",
        "a number": pickle.dumps(1),
        "another class": pickle.dumps(BytesStorageMetadata()),
        "half of it": whole[: len(whole) // 2],
        "without its end": whole[:-1],
        "with more behind it": whole + b"N.",
        "an empty one": pickle.dumps(Metadata({}, None, None)),
        "keys that are no text": pickle.dumps(Metadata({1: BytesStorageMetadata()}, None, {})),  # type: ignore[dict-item]
        "lists of lists": laughs + b".",
        "a key that takes for ever to hash": tuples,
        "a list in itself": b"\x80\x04]q\x00h\x00a.",
        "a text of 4 GiB": b"\x80\x04X\xff\xff\xff\xffabc.",
        "bytes of 2**60": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"abc.",
        "a number of 2 GiB": b"\x80\x04\x8b\xff\xff\xff\x7f1.",
        "a memo of 4 billion": b"\x80\x04Nr\xff\xff\xff\xff.",
        "marks": b"\x80\x04" + b"(" * 300_000 + b".",
        "deep": b"\x80\x04" + b"]" * 300_000 + b"a" * 299_999 + b".",
        "frames": b"\x80\x04" + b"\x95" + b"\xff" * 8 + b"N.",
        "nothing to pop": b"\x80\x04aaa.",
        "over a mark": b"\x80\x04](Na.",
        "lone surrogates": b"\x80\x04X\x03\x00\x00\x00\xed\xa0\x80.",
        "escapes of a terminal": b"\x80\x04c\x1b]0;gotcha\x07\nx\x1b[2J\n.",
    }


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "dist"
    assert cli.main(["convert", "hf-to-dist", str(GOLDEN / "llama_before"), str(folder)]) == 0
    return folder


@pytest.fixture(autouse=True)
def small_workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def copy_of(dist: Path) -> Path:
    return Path(shutil.copytree(dist, "model"))


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line in which the command refuses, having run nothing."""
    started = time.monotonic()
    assert cli.main(words) == 2
    assert time.monotonic() - started < 30
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error[:-1].isprintable()
    assert len(error) < 700
    assert not Path("escaped").exists()
    return error


@pytest.mark.parametrize("name", [*calls(), *bombs()])
def test_hostile_metadata(name: str) -> None:
    Path(".metadata").write_bytes((calls() | bombs())[name])
    with pytest.raises(ValueError, match=r"^\.metadata cannot be read: .*; expected a folder that") as refusal:
        read_metadata(Path())
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 500
    assert not Path("escaped").exists()


@pytest.mark.parametrize("name", ["system", "in the plan", "BUILD on a class", "escapes of a terminal", "deep"])
def test_convert_of_hostile_metadata(name: str, dist: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of(dist)
    (folder / ".metadata").write_bytes((calls() | bombs())[name])
    for command in ("dist-to-hf", "verify"):
        error = refused(["convert", command, str(folder), "out"], capsys)
        assert "model/.metadata cannot be read: " in error
    assert not Path("out").exists()


def test_huge_metadata(dist: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of(dist)
    os.truncate(folder / ".metadata", 1 << 40)
    assert "has 1099511627776 bytes, expected" in refused(["convert", "dist-to-hf", str(folder), "out"], capsys)


def test_the_calls_do_run_where_they_are_unpickled() -> None:
    ran = set()
    # Else the test above would show nothing.
    for name, content in calls().items():
        script = f"import pickle\ntry: pickle.loads({content!r})\nexcept Exception: pass"
        subprocess.run(
            [sys.executable, "-S", "-c", script], check=True, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
        )
        if Path("escaped").exists():
            Path("escaped").unlink()
            ran.add(name)
    assert {"system", "eval", "exec", "protocol 0", "INST", "OBJ", "name in two texts"} <= ran


def torch_file(data: bytes, **members: bytes) -> bytes:
    """A file of ``torch.save`` with ``data`` in the place of its pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        for name, content in members.items():
            archive.writestr(f"archive/{name}".replace("__", "/"), content)
    return file.getvalue()


def tensor_pickle(
    size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, kind: bytes = b"FloatStorage"
) -> bytes:
    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"

    storage = b"(" + text("storage") + b"ctorch\n" + kind + b"\n" + text("0") + text("cpu") + b"K\x04tQ"
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"\x8a\x08"
        + struct.pack("<q", offset)
        + numbers(size)
        + numbers(stride)
        + b"\x89ccollections\nOrderedDict\n)RtR."
    )


def tensors() -> dict[str, bytes]:
    """Files of one float32 tensor with a storage of 16 bytes, each of them wrong."""
    held = {"data__0": bytes(16)}
    compressed = io.BytesIO()
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", tensor_pickle((1 << 28,), (1,)))
        archive.writestr("archive/data/0", bytes(1 << 20))
    good = torch_file(tensor_pickle((4,), (1,)), **held)
    return {
        "huge": torch_file(tensor_pickle((1 << 39,), (1,)), **held),
        "expanded": torch_file(tensor_pickle((1 << 39,), (0,)), **held),
        "behind its storage": torch_file(tensor_pickle((4,), (1,), offset=1), **held),
        "strided out of it": torch_file(tensor_pickle((2, 2), (1 << 30, 1)), **held),
        "negative": torch_file(tensor_pickle((-4,), (1,)), **held),
        "negative stride": torch_file(tensor_pickle((4,), (-1,)), **held),
        "negative offset": torch_file(tensor_pickle((4,), (1,), offset=-4), **held),
        "stride of too few dimensions": torch_file(tensor_pickle((2, 2), (1,)), **held),
        "storage of no type": torch_file(tensor_pickle((4,), (1,), kind=b"os"), **held),
        "no storage": torch_file(tensor_pickle((4,), (1,))),
        "bomb of zip": compressed.getvalue(),
        "big endian": good.replace(b"little", b"bigggg"),
        "cut short": good[:-40],
        "legacy": pickle.dumps(0x1950A86A20F9469CFC6C) + pickle.dumps(1001) + pickle.dumps({}),
    }


@pytest.mark.parametrize("name", [*calls(), *bombs(), *tensors()])
def test_hostile_torch_files(name: str) -> None:
    pickles = calls() | bombs()
    content = torch_file(pickles[name]) if name in pickles else tensors()[name]
    if name in ("a number", "frames", "a memo of 4 billion"):
        # Plain data is harmless in any place; what is expected there is for its reader to see.
        assert read_torch_file(io.BytesIO(content)) in (1, None)
        return
    with pytest.raises(ForeignPickle) as refusal:
        read_torch_file(io.BytesIO(content))
    assert len(str(refusal.value)) < 500
    assert not Path("escaped").exists()


@pytest.mark.parametrize("name", ["system", "BUILD on a class", "huge", "bomb of zip", "no storage"])
def test_hostile_tensors_of_a_folder(name: str, dist: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of(dist)
    evil = torch_file(calls()[name]) if name in calls() else tensors()[name]
    file, metadata = folder / "__0_0.distcp", pickle.loads((folder / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, len(evil)
    file.write_bytes(evil)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "__0_0.distcp cannot be read: " in refused(["convert", "dist-to-hf", str(folder), "out"], capsys)


def rewrite(folder: Path, change: Callable[[Any], None]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def overlap(metadata: Any) -> None:
    """As many places as the tensor has, by two parts that share some, so that others are nowhere."""
    stored = embedding(metadata)
    rows, columns = stored.size
    stored.chunks[:] = [
        ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([rows - 1, columns])),
        ChunkStorageMetadata(torch.Size([1, 0]), torch.Size([1, columns])),
    ]


def places(metadata: Any, **values: Any) -> None:
    for place in metadata.storage_data.values():
        vars(place).update(values)


def embedding(metadata: Any) -> Any:
    return metadata.state_dict_metadata["embedding.word_embeddings.weight"]


LIES = {
    "file outside": (lambda m: places(m, relative_path="../../../../etc/passwd"), "no name of a file"),
    "absolute file": (lambda m: places(m, relative_path="/etc/passwd"), "no name of a file"),
    "offset behind the end": (lambda m: places(m, offset=1 << 45), "has 934777 bytes, expected at least"),
    "negative offset": (lambda m: places(m, offset=-1), "in the place of a whole number"),
    "length without end": (lambda m: places(m, length=1 << 45), "bytes, expected at least"),
    "transforms": (lambda m: places(m, transform_descriptors=["zstd"]), "compressed or encrypted"),
    "no places": (lambda m: m.storage_data.clear(), "does not say where"),
    "no chunks": (lambda m: embedding(m).chunks.clear(), "is not whole"),
    "chunk twice": (
        lambda m: embedding(m).chunks.extend(embedding(m).chunks),
        "is not whole",
    ),
    "chunks that overlap": (overlap, "is not whole"),
    "another dtype": (lambda m: setattr(embedding(m).properties, "dtype", "float32"), "dtype"),
    "size that is none": (lambda m: setattr(embedding(m), "size", [720, 64]), "torch.Size"),
    "huge size": (
        lambda m: setattr(embedding(m), "size", torch.Size([1 << 51, 64])),
        "whole number",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_metadata_that_lies(lie: str, dist: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = LIES[lie]
    folder = copy_of(dist)
    rewrite(folder, change)
    assert message in refused(["convert", "dist-to-hf", str(folder), "out"], capsys)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link to itself"])
def test_metadata_that_is_no_file(kind: str, dist: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of(dist)
    path = folder / ".metadata"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)
    refused(["convert", "dist-to-hf", str(folder), "out"], capsys)


@pytest.mark.parametrize("command", ["train", "validate"])
def test_a_hostile_model_is_refused_before_ranks_start(
    command: str, dist: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(dist)
    (folder / ".metadata").write_bytes(calls()["in the plan"])
    samples = str(GOLDEN / "samples.jsonl")
    words = [f"model.path={folder}", "model.dtype=float32", "data.max_length=448", "batch.tokens_per_microbatch=1024"]
    words += [f"data.train=[{{path: {samples}}}]", f"data.validation=[{{path: {samples}}}]", "output_dir=run"]
    Path("run.yaml").write_text("output_dir: run\n")
    assert "it names posix.system" in refused([command, "run.yaml", *words], capsys)


@pytest.mark.parametrize(
    "damage",
    [
        *(torch_file(data) for data in (calls()["system"], calls()["BUILD on a class"], pickle.dumps([1]))),
        pickle.dumps(Call(os.system, MARK)),
        b"",
        b"no",
    ],
    ids=["system", "BUILD on a class", "a list", "bare pickle", "empty", "text"],
)
def test_common_of_a_resumed_run(damage: bytes, dist: Path) -> None:
    from reflectron.engine.checkpoint.storage import load_checkpoint

    folder = copy_of(dist)
    (folder / "common.pt").write_bytes(damage)
    with pytest.raises(ValueError, match=r"common.pt cannot be read: .*; expected a checkpoint of a run") as refusal:
        load_checkpoint({}, folder)
    assert str(refusal.value).isprintable()
    assert not Path("escaped").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"sharded_backend": "zarr"}', '{"os": 1}', "[" * 100_000])
def test_format_of_a_resumed_run(content: str, dist: Path) -> None:
    from reflectron.engine.checkpoint.storage import load_checkpoint

    folder = copy_of(dist)
    (folder / "metadata.json").write_text(content)
    with pytest.raises(ValueError, match=r"metadata.json (is damaged|names) ?.*, expected"):
        load_checkpoint({}, folder)


def test_what_is_read_is_what_unpickling_gives(dist: Path) -> None:
    expected = pickle.loads((dist / ".metadata").read_bytes())
    found = read_metadata(dist)
    assert found.state_dict_metadata == expected.state_dict_metadata
    assert found.storage_data == expected.storage_data
    assert len(found.storage_data) > 20


@pytest.mark.parametrize(
    "value",
    [
        *(torch.arange(24).reshape(2, 3, 4).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.uint8)),
        torch.arange(24).reshape(4, 6).t(),
        torch.arange(24)[3:9],
        torch.arange(4).to(torch.float8_e4m3fn),
        torch.empty(0, 3),
        torch.tensor(3.0),
    ],
    ids=str,
)
def test_tensors_are_what_torch_loads(value: torch.Tensor) -> None:
    file = io.BytesIO()
    torch.save(value, file)
    found = read_torch_file(file)
    assert found.dtype == value.dtype
    assert found.shape == value.shape
    assert torch.equal(found.double(), value.double())


def test_plain_data_is_what_torch_loads() -> None:
    value = {"a": [None, True, -1, 2**70, 1.5, b"\xff", b"", "ü", (1, 2, 3, 4)], 3: io.BytesIO(b"\xffx"), "e": {}}
    file = io.BytesIO()
    torch.save(value, file)
    found = read_torch_file(file)
    assert found.pop(3).getvalue() == value.pop(3).getvalue()  # type: ignore[attr-defined]
    assert found == value


def test_limits_hold_memory_down() -> None:
    with pytest.raises(ForeignPickle, match="more than 1000 objects"):
        parse(b"\x80\x04" + b"]" * 2000, (), PickleLimits(nodes=1000))
    with pytest.raises(ForeignPickle, match="expected at most 10"):
        parse(b"\x80\x04" + b"N" * 2000, (), PickleLimits(bytes=10))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for content in bombs().values():
        with suppress(ForeignPickle):
            parse(content, dist_metadata._NAMES, PickleLimits())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_an_inert_call_is_no_call() -> None:
    node = parse(b"\x80\x04cos\nsystem\n" + text(MARK) + b"\x85R.", {"os.system"}, PickleLimits())
    assert isinstance(node, Made)
    assert (node.name, node.args) == ("os.system", (MARK,))
    assert not Path("escaped").exists()


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        ([((0, 0), (4, 6))], True),
        ([((0, 0), (2, 3)), ((0, 3), (2, 3)), ((2, 0), (2, 3)), ((2, 3), (2, 3))], True),
        # Bricks: no grid, and yet each place once.
        ([((0, 0), (2, 2)), ((0, 2), (2, 4)), ((2, 0), (2, 4)), ((2, 4), (2, 2))], True),
        ([((0, 0), (3, 6)), ((1, 0), (1, 6))], False),
        ([((0, 0), (2, 6)), ((1, 0), (2, 6))], False),
        ([((0, 0), (4, 3)), ((0, 3), (4, 2))], False),
    ],
)
def test_parts_of_a_tensor(parts: list[Any], whole: bool) -> None:
    chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in parts]
    stored = TensorStorageMetadata(TensorProperties(), torch.Size([4, 6]), chunks)
    if whole:
        dist_metadata.check_whole("key", stored)
    else:
        with pytest.raises(ValueError, match="key is not whole"):
            dist_metadata.check_whole("key", stored)
