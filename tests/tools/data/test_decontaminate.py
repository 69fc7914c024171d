"""Decontamination: what is evidence and what is not, exact positions, and that every record ends up in one place."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reflectron.tools import cli
from reflectron.tools.benchmarks.catalogue import Fragment, load_benchmark
from reflectron.tools.data.corpus import RecordText, lowered, squeezed, word_spans, words
from reflectron.tools.data.decontaminate import Allowed, Detector, Evidence, Match
from testkit.places import ROOT

BENCHMARKS = [str(ROOT / "tests" / "benchmarks" / name) for name in ("human_eval.jsonl", "mbpp.jsonl")]
QUICKSTART = sorted((ROOT / "examples" / "quickstart" / "data").glob("*.jsonl"))


@pytest.fixture(scope="module")
def fragments() -> tuple[Fragment, ...]:
    return tuple(fragment for source in BENCHMARKS for fragment in load_benchmark(source))


@pytest.fixture(scope="module")
def detector(fragments: tuple[Fragment, ...]) -> Detector:
    return Detector(fragments, Evidence())


def find(detector: Detector, text: str) -> list[Match]:
    return [match for _, match in detector.search([RecordText("content", text)])]


def fragment(fragments: Sequence[Fragment], task_id: str, part: str) -> Fragment:
    (found,) = [f for f in fragments if (f.task_id, f.part) == (task_id, part)]
    return found


def write_rows(path: Path, rows: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def decontaminate(data: Sequence[object], out: Path, *more: str) -> list[dict[str, Any]]:
    """Run the command; returns the report."""
    command = ["data", "decontaminate", *map(str, data), "--benchmarks", *BENCHMARKS, "--out", str(out), *more]
    assert cli.main(command) == 0
    return read_rows(out / "report.jsonl")


def test_every_text_long_enough_is_found_in_any_case_and_layout(
    fragments: tuple[Fragment, ...], detector: Detector
) -> None:
    long = [f for f in fragments if len(words(f.text)) >= 10]
    assert len(long) > 30
    for one in long:
        before, inside = "İ Here\tit is:\n", one.text.strip().upper().replace("\n", " \n\n\t")
        matches = [
            m for m in find(detector, before + inside + "\nDone.") if (m.task_id, m.part) == (one.task_id, one.part)
        ]
        assert [(m.kind, m.start, m.end, m.text) for m in matches] == [
            ("exact", len(before), len(before) + len(inside), inside)
        ]


@pytest.mark.parametrize("text", ["def add(x, y):\n    return x + y", "return len(string)", "Add two numbers x and y"])
def test_what_everyone_writes_is_no_evidence(detector: Detector, text: str) -> None:
    assert find(detector, text) == []


def test_a_comment_of_other_shape_is_found_by_ngrams(fragments: tuple[Fragment, ...], detector: Detector) -> None:
    description = fragment(fragments, "HumanEval/3", "description").text
    lines = description.strip().splitlines()
    commented = "x = 1\n" + "\n".join(f"// {line.strip()}" for line in lines)
    (match,) = [m for m in find(detector, commented) if m.part == "description"]
    assert (match.kind, match.task_id, match.overlap) == ("ngram", "HumanEval/3", 1.0)
    assert commented[match.start : match.end] == match.text
    assert match.text.startswith("You're given a list")
    assert match.text.endswith("should return False")


def test_overlap_is_the_share_of_the_fragments_ngrams() -> None:
    text = " ".join(f"w{i}" for i in range(25))
    detector = Detector((Fragment("B", "1", "description", text),), Evidence(min_words=10, ngram=6, overlap=0.5))
    for kept, expected in ((14, []), (15, [0.5]), (24, [0.95])):
        assert [m.overlap for m in find(detector, " ".join(text.split()[:kept]) + " other words")] == expected


def test_ngrams_do_not_reach_over_the_end_of_a_text() -> None:
    text = " ".join(f"w{i}" for i in range(20))
    detector = Detector((Fragment("B", "1", "description", text),), Evidence())
    halves = [RecordText("a", " ".join(text.split()[:8])), RecordText("b", " ".join(text.split()[8:16]))]
    assert list(detector.search(halves)) == []


def test_the_same_as_a_plain_search(fragments: tuple[Fragment, ...]) -> None:
    generator = random.Random(0)
    pieces = [f.text for f in fragments]
    detector = Detector(fragments, Evidence(min_words=6, ngram=4, overlap=0.4))
    seen = set()
    for _ in range(20):
        drawn = [w for piece in generator.choices(pieces, k=3) for w in piece.split() if generator.random() > 0.1]
        text = "\n".join(drawn)
        expected = {(f.task_id, f.part, *plain(f.text, text, 6, 4, 0.4)) for f in fragments} - {
            (f.task_id, f.part, None) for f in fragments
        }
        assert {(m.task_id, m.part, m.kind, m.overlap) for m in find(detector, text)} == expected
        seen |= {kind for _, _, kind, _ in expected}
    assert seen == {"exact", "ngram"}


def plain(fragment: str, text: str, min_words: int, n: int, overlap: float) -> tuple[Any, ...]:
    own = words(fragment)
    if len(own) < min_words:
        return (None,)
    if squeezed(fragment) in squeezed(text):
        return ("exact", 1.0)
    grams, found = ({tuple(w[i : i + n]) for i in range(len(w) - n + 1)} for w in (own, words(text)))
    share = len(grams & found) / len(grams)
    enough = share >= overlap and len(grams & found) + n - 1 >= min_words
    return ("ngram", round(share, 4)) if enough else (None,)


def test_lower_case_keeps_every_offset() -> None:
    text = "İSTANBUL Σ straße"
    assert len(lowered(text)) == len(text)
    assert [text[start:end].lower() for start, end in word_spans(text)][1:] == ["σ", "straße"]


def test_allow_list_by_task_and_by_text(fragments: tuple[Fragment, ...]) -> None:
    solution = fragment(fragments, "HumanEval/3", "solution").text
    for entry in (Allowed(task_id="HumanEval/3"), Allowed(benchmark="HumanEval", text=" ".join(solution.split()))):
        assert find(Detector(fragments, Evidence(), (entry,)), solution) == []
    assert find(Detector(fragments, Evidence(), (Allowed(benchmark="MBPP"),)), solution)


def test_every_record_ends_up_kept_or_excluded(
    tmp_path: Path, fragments: tuple[Fragment, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    solution, question = (
        fragment(fragments, *key).text for key in (("HumanEval/3", "solution"), ("Mbpp/74", "description"))
    )
    code = [{"type": "text", "content": "Try:"}, {"type": "code", "content": f"# mine\n{solution}"}]
    rows = [
        {"problem": "Add.", "solution": "return x + y"},
        {"messages": [{"role": "assistant", "content": code}], "type": "reflection"},
        {"problem": question, "solution": "no"},
        {"number": 3},
    ]
    data = tmp_path / "mine.jsonl"
    data.write_bytes(b"\n".join(json.dumps(row).encode() for row in rows) + b'\n\n{oops\n{"a": "\\ud800 b"}\n')
    report = decontaminate([data], tmp_path / "out")
    lines = [line for line in data.read_bytes().split(b"\n") if line]
    assert (tmp_path / "out" / "kept" / "mine.jsonl").read_bytes() == lines[0] + b"\n"
    assert (tmp_path / "out" / "excluded" / "mine.jsonl").read_bytes() == b"\n".join(lines[1:]) + b"\n"
    assert [(r["line"], r.get("task_id"), r.get("field")) for r in report] == [
        (2, "HumanEval/3", "messages[0].content[1].content"),
        (3, "Mbpp/74", "problem"),
        (4, None, None),
        (6, None, None),
        (7, None, None),
    ]
    assert report[0]["text"] == code[1]["content"][report[0]["start"] : report[0]["end"]]
    out = capsys.readouterr().out
    assert "6 records, 1 kept, 2 contaminated (HumanEval 1, MBPP 1), 3 unreadable" in out
    assert "HumanEval: 8 tasks" in out


def test_parquet_columns_and_an_allow_list_file(tmp_path: Path, fragments: tuple[Fragment, ...]) -> None:
    solution = fragment(fragments, "HumanEval/3", "solution").text
    pq.write_table(pa.table({"content": ["x = 1", solution], "license": [solution, "MIT"]}), tmp_path / "code.parquet")
    report = decontaminate([tmp_path / "code.parquet"], tmp_path / "out", "--columns", "content")
    assert [row["index"] for row in report] == [1]
    assert read_rows(tmp_path / "out" / "kept" / "code.jsonl") == [{"content": "x = 1", "license": solution}]
    # A row of the report serves as an entry of the allow-list.
    allow = write_rows(tmp_path / "allow.jsonl", report)
    assert not decontaminate([tmp_path / "code.parquet"], tmp_path / "out", "--columns", "content", "--allow", allow)


def test_quickstart_holds_no_benchmark(tmp_path: Path) -> None:
    assert len(QUICKSTART) == 4
    assert decontaminate(QUICKSTART, tmp_path) == []


def test_two_files_of_one_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(write_rows(tmp_path / folder / "x.jsonl", [{"text": "one"}]))
    assert cli.main(["data", "decontaminate", *paths, "--benchmarks", *BENCHMARKS, "--out", str(tmp_path / "out")]) == 2
    assert "would both be written as x.jsonl" in capsys.readouterr().err


SCHEMAS: list[tuple[dict[str, object], str, str, dict[str, str]]] = [
    (
        {"task_id": 11, "text": "Say it.", "code": "say()", "test_list": ["assert a", "assert b"]},
        "MBPP",
        "Mbpp/11",
        {"description": "Say it.", "solution": "say()", "tests": "assert a\nassert b"},
    ),
    (
        {"prompt": "Problem:\nSum it.\nA:\n<code>", "reference_code": "df.sum()", "metadata": {"problem_id": 7}},
        "DS-1000",
        "7",
        {"description": "\nSum it.", "solution": "df.sum()"},
    ),
    (
        {"problem_id": 3, "question": "Count.", "solutions": "[]", "input_output": ""},
        "APPS",
        "3",
        {"description": "Count."},
    ),
    (
        {"question": "How many?", "answer": "Two and two.\n#### 4"},
        "GSM8K",
        "0",
        {"description": "How many?", "solution": "Two and two.\n"},
    ),
    (
        {"name": "HumanEval_3", "language": "rs", "prompt": "/// Below.\nfn f() {", "tests": "}"},
        "MultiPL-E",
        "rs/HumanEval_3",
        {"description": "/// Below.\nfn f() {"},
    ),
]


@pytest.mark.parametrize(("row", "benchmark", "task_id", "parts"), SCHEMAS, ids=[s[1] for s in SCHEMAS])
def test_benchmarks_are_recognised_by_their_columns(
    row: dict[str, object], benchmark: str, task_id: str, parts: dict[str, str], tmp_path: Path
) -> None:
    expected = [Fragment(benchmark, task_id, part, text) for part, text in parts.items()]  # type: ignore[arg-type]
    (tmp_path / "array.json").write_text(json.dumps([row]), encoding="utf-8")
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode() + b"\n"))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "table.parquet")
    for name in ("array.json", "lines.jsonl.gz", "table.parquet"):
        assert load_benchmark(str(tmp_path / name)) == expected


def test_bad_benchmarks_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for content, message in (
        ("{oops", r"benchmark .*x.jsonl cannot be read"),
        ('{"a": 1}', r"benchmark .*x.jsonl: unknown columns a; expected one of"),
        ("", r"data file .*x.jsonl holds no record"),
        ('{"question": "q", "answer": 5}', r"benchmark .*x.jsonl: row 1 has a column of an unexpected type"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            load_benchmark(str(path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"a": 1}\n' * 3, "none of its 3 records has a text to look at, most for 'no text'"),
        ("instruction,output\nx,y\n", "none of its 2 records has a text to look at, most for 'bad JSON'"),
        (
            '{"data": [{"instruction": "x"}, {"instruction": "y"}]}',
            "one JSON object, whose list 'data' holds 2 objects",
        ),
        ("", "holds no record"),
    ],
)
def test_a_file_without_a_text_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, said: str
) -> None:
    (tmp_path / "x.json").write_text(content)
    command = ["data", "decontaminate", str(tmp_path / "x.json"), "--benchmarks", *BENCHMARKS]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert "contaminated" not in printed.out
    assert not list((tmp_path / "out").glob("kept/*"))


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_of_records_is_searched(tmp_path: Path, fragments: tuple[Fragment, ...], indent: int | None) -> None:
    rows = [{"text": "nothing\nto find here"}, {"text": fragment(fragments, "HumanEval/3", "prompt").text}]
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=indent))
    (report, *_) = decontaminate([tmp_path / "x.json"], tmp_path / "out")
    assert (report["task_id"], report["index"], report["line"]) == ("HumanEval/3", 1, 1 if indent is None else 5)
    kept, excluded = ((tmp_path / "out" / part / "x.jsonl").read_text() for part in ("kept", "excluded"))
    assert [json.loads(line) for line in (kept + excluded).splitlines()] == rows


@pytest.mark.slow
def test_workers_change_nothing(tmp_path: Path, fragments: tuple[Fragment, ...]) -> None:
    generator = random.Random(0)
    texts = [f.text for f in fragments if len(words(f.text)) >= 10]
    rows = [
        {"content": generator.choice(texts) if n % 97 == 0 else " ".join(generator.choices(words(texts[0]), k=20))}
        for n in range(6000)
    ]
    data = write_rows(tmp_path / "many.jsonl", rows)
    reports = [decontaminate([data], tmp_path / w, "--workers", w) for w in ("1", "3")]
    assert reports[0] == reports[1]
    assert {row["index"] for row in reports[0]} == set(range(0, 6000, 97))
    for folder in ("kept", "excluded"):
        first, second = ((tmp_path / w / folder / "many.jsonl").read_bytes() for w in ("1", "3"))
        assert first == second
