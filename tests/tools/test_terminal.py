"""Nothing that others wrote reaches a terminal raw: not through a print, an error, a table, a bar or a drawing."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from reflectron.engine.terminal import ProtectedStream, console, protected_streams
from reflectron.tools import cli
from reflectron.tools.llm.scripted_server import Body, Scripted, ScriptedServer
from testkit.places import ROOT

LINK = "\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\"
HOSTILE = f"\x1b]0;owned\x07{LINK}\x1b]52;c;cm0=\x07\x1b[2J\x1b[31;5;7m\x9b31m\u202e\r\x08\x1b[Aowned[bold]:bug:[/bold]"
NAME = HOSTILE.replace("/", "").replace("=", "")
"""The name of a file or a language."""
SHOWN = "owned[bold]:bug:[/bold]"
FAULTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Styles, cursor and erasure as rich draws them.
OWN = re.compile(r"\x1b\[(?:\d{1,2}(?:;\d{1,3})*)?m|\x1b\[\?25[lh]|\x1b\[1A|\x1b\[2K|\r")


def check(text: str, *, shown: bool = True) -> None:
    """There is no control character, and the hostile text is there."""
    assert FAULTS.search(text) is None, repr(FAULTS.search(text))
    if shown:
        assert SHOWN in text


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("plain\n\ttext\n", "plain\n\ttext\n"),
        ("日本語\u3000é\xa0x", "日本語\u3000é\xa0x"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("\x9b31m\x85\u2028", "\\x9b31m\\x85\\u2028"),
        ("half \ud800", "half \\ud800"),
        ("\u202eabc\u2066", "\\u202eabc\\u2066"),
        ("a\rb\b\x7f", "a\\rb\\x08\\x7f"),
        ("\r50%", "\\r50%"),
    ],
)
def test_a_stream_escapes(text: str, written: str) -> None:
    stream = io.StringIO()
    print(text, end="", file=ProtectedStream(stream))
    assert stream.getvalue() == written


def test_a_stream_takes_what_its_encoding_cannot_hold() -> None:
    raw = io.BytesIO()
    stream = ProtectedStream(io.TextIOWrapper(raw, "ascii", write_through=True))
    stream.writelines(["é 日", "本\n"])
    assert raw.getvalue() == b"\\xe9 \\u65e5\\u672c\n"


def test_a_bar_overwrites_its_own_line_only() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    protected = ProtectedStream(stream)
    for text in ("\r10%", "\r20%\n", "rm -rf /", "\rls", "\n"):
        protected.write(text)
    assert stream.getvalue() == "\r10%\r20%\nrm -rf /\\rls\n"


def test_log_lines_and_tracebacks_pass_the_filter(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        logging.getLogger("of others").addHandler(handler := logging.StreamHandler())
        logging.getLogger("of others").error("%s", HOSTILE)
        handler.close()
        raise ValueError(HOSTILE + "\nsecond line")

    with protected_streams():
        assert cli.guarded("reflectron", fail, debug=True) == 2
    shown = capsys.readouterr().err
    check(shown)
    assert "Traceback" in shown
    # An error is one line, whatever its text says.
    assert shown.splitlines()[-1].startswith("reflectron: error: ")
    assert shown.splitlines()[-1].endswith("second line")


def test_the_streams_are_given_back() -> None:
    before = sys.stdout, sys.stderr
    with protected_streams(), protected_streams():
        assert isinstance(sys.stdout, ProtectedStream)
        assert not isinstance(sys.stdout.unprotected, ProtectedStream)
    assert (sys.stdout, sys.stderr) == before


def test_rich_draws_text_of_others_as_text() -> None:
    from rich.table import Table

    stream = io.StringIO()
    page = console(force_terminal=True, width=1000)
    page.file = stream
    table = Table("name", title=HOSTILE)
    table.add_row(HOSTILE)
    page.print(table)
    page.print(HOSTILE, style="red")
    drawn = OWN.sub("", stream.getvalue())
    assert "".join(drawn.split()).count(SHOWN) == 3
    check(drawn)


def reply(body: Body) -> Scripted:
    """An answer, or an error, all hostile."""
    if "fail" in body["messages"][1]["content"]:
        return Scripted(status=400, raw=HOSTILE.encode())
    return Scripted(text=f"[Problem Description]\n{HOSTILE}\n[Solution]\n{HOSTILE}")


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(reply) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of each kind, hostile in name and content; in the names nothing that no name can have."""
    turns = [{"role": role, "content": [{"type": "text", "content": HOSTILE}]} for role in ("user", "assistant")] * 2
    code = [{"type": kind, "content": HOSTILE} for kind in ("text", "code", "execution")]
    turns[1] = {"role": "assistant", "content": code}
    records: list[Any] = [{"messages": turns, "type": "reflection"}, {HOSTILE: 1}, {"messages": HOSTILE}, HOSTILE]
    records.append({"problem": HOSTILE, "solution": HOSTILE})
    (tmp_path / f"{NAME}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    documents = [{"content": f"def a():\n    fail({n})\n{HOSTILE}\n" * 9, "lang": HOSTILE} for n in range(2)]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    (tmp_path / "completions.jsonl").write_text(json.dumps({"task_id": HOSTILE, "solution": HOSTILE}) + "\n")
    (tmp_path / "config.yaml").write_text(json.dumps({"seed": HOSTILE, HOSTILE: HOSTILE}))
    (tmp_path / "sound.yaml").write_text("seed: 1\n")
    return tmp_path


Words = Callable[[Path, str, Path], list[str]]
COMMANDS: dict[str, Words] = {
    "a command that is none": lambda folder, url, golden: [HOSTILE],
    "an argument that is none": lambda folder, url, golden: ["doctor", HOSTILE],
    "a configuration": lambda folder, url, golden: ["train", str(folder / "config.yaml")],
    "an override": lambda folder, url, golden: ["train", str(folder / "sound.yaml"), f"{HOSTILE}=1"],
    "a file that is none": lambda folder, url, golden: ["data", "deduplicate", f"/{HOSTILE}", "--out", "out"],
    "samples": lambda folder, url, golden: [
        "inspect",
        "--data",
        _file(folder),
        "--tokenizer",
        str(golden / "llama_after"),
    ],
    "duplicates": lambda folder, url, golden: ["data", "deduplicate", _file(folder), "--out", str(folder / "out")],
    "a model's answers": lambda folder, url, golden: [
        *("data", "oss-instruct", f"{NAME}={folder / 'documents.jsonl'}", "--quota", f"{NAME}=5"),
        *("--out", str(folder / NAME), "--endpoint", url, "--model", HOSTILE),
    ],
    "an address": lambda folder, url, golden: [
        *("data", "oss-instruct", f"x={folder / 'documents.jsonl'}", "--quota", "x=5", "--out", str(folder / "out")),
        *("--endpoint", f"ftp://host/{HOSTILE}", "--model", "tiny"),
    ],
    "completions": lambda folder, url, golden: [
        *("eval", "score", str(folder / "completions.jsonl"), "--dataset", "humaneval"),
        *("--data", str(golden.parent / "benchmarks" / "humaneval_plus_subset.jsonl")),
    ],
}


def _file(folder: Path) -> str:
    (file,) = (path for path in folder.glob("*.jsonl") if "owned" in path.name)
    return str(file)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_shows_hostile_text_escaped(
    name: str, folder: Path, server: ScriptedServer, golden_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = COMMANDS[name](folder, server.url, golden_dir)
    try:
        code = cli.main(words)
    except SystemExit as end:
        code = int(str(end.code))
    shown = capsys.readouterr()
    assert code in (0, 1, 2)
    check(shown.out + shown.err, shown=False)
    assert "owned" in shown.out + shown.err


def test_reasons_that_quote_a_record_can_be_written(
    tmp_path: Path, golden_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lone surrogates, which JSON can spell and no file can hold, come out escaped."""
    half = "\ud800"
    turn = {"role": "user", "content": [{"type": half, "content": "x"}]}
    records: list[Any] = [{half: 1}, {"messages": half}, {"messages": [turn]}, {"messages": [{"role": half}]}]
    records += [{"problem": f"a{half}", "solution": "b"}, {"problem": "a", "solution": "b"}]
    data, tokenizer = tmp_path / "data.jsonl", str(golden_dir / "llama_after")
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert cli.main(["inspect", "--data", str(data), "--tokenizer", tokenizer, "--json", str(tmp_path / "out")]) == 0
    assert len(json.loads((tmp_path / "out").read_text(encoding="utf-8"))["dropped"]) == 5
    assert cli.main(["data", "deduplicate", str(data), "--out", str(tmp_path / "duplicates")]) == 0
    assert cli.main(["data", "stats", "--data", str(data), "--tokenizer", tokenizer]) == 2
    shown = "".join(capsys.readouterr())
    check(shown, shown=False)
    assert "5 of 6 records are rejected, most for 'unknown columns'" in shown


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_there_is_one_way_to_a_terminal() -> None:
    """Whoever draws with rich does it on a console of ``engine.terminal``, and nobody writes beside the filter."""
    root = ROOT
    sources = [path for room in ("engine", "kernels", "tools") for path in (root / room).rglob("*.py")]
    assert len(sources) > 100
    drawn = 0
    for path in sources:
        if path.name == "terminal.py":
            continue
        for name, call in calls(path):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            place = f"{path.relative_to(root)}:{call.lineno}"
            assert not name.endswith(("Console", "rich.print", "stdout.buffer.write", "stderr.buffer.write")), place
            bar = name == "Progress" and path.name in ("run_log.py", "arguments.py", "store.py")
            if bar or name == "track":
                drawn += 1
                assert given.get("console"), f"{place}: {name} without console="
            if bar:
                assert given["redirect_stdout"] == given["redirect_stderr"] == "False", place
            if name == "TextColumn" and "{" in ast.unparse(call.args[0]):
                assert given.get("markup") == "False", f"{place}: a TextColumn that reads markup"
    assert drawn >= 5


def on_a_terminal(words: list[str]) -> str:
    """What a command writes to a terminal of its own, both streams."""
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "400"}
    process = subprocess.Popen(
        [sys.executable, "-m", "reflectron.tools.cli", *words], stdout=theirs, stderr=theirs, env=env
    )
    os.close(theirs)
    parts: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(ours, 1 << 16):
                parts.append(part)
        except OSError:
            # EIO: the terminal has no other end any more.
            return

    reader = threading.Thread(target=read)
    reader.start()
    process.wait(120)
    reader.join()
    os.close(ours)
    return b"".join(parts).decode()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["samples", "a model's answers", "an argument that is none"])
def test_a_terminal_gets_the_tools_own_sequences_only(
    name: str, folder: Path, server: ScriptedServer, golden_dir: Path
) -> None:
    shown = on_a_terminal(COMMANDS[name](folder, server.url, golden_dir))
    check(OWN.sub("", shown), shown=False)
    assert "owned" in shown
    # A style that rich never draws here.
    assert "\x1b[31;5;7m" not in shown
