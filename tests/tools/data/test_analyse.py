"""The analysis of a small set with known languages, a planted copy of a task, and a page that is complete in itself."""

from __future__ import annotations

import html.parser
import json
from pathlib import Path

import pytest

from reflectron.engine.data.sources import Record
from reflectron.tools import cli
from reflectron.tools.benchmarks.catalogue import load_benchmark
from reflectron.tools.data.analyse import Document, read_document
from testkit.places import TESTS_DIR

HUMAN_EVAL = str(TESTS_DIR / "benchmarks" / "human_eval.jsonl")
QUERIES = "Join the two database tables with SQL and select rows by a foreign key."


@pytest.mark.parametrize(
    ("row", "language", "instruction", "answer"),
    [
        ({"lang": "C++", "problem": "Do.", "solution": "x"}, "cpp", "Do.", "x"),
        ({"instruction": "Do.", "output": "```js\nx\n```\n```js\ny\n```\n```py\nz\n```"}, "js", "Do.", "js"),
        ({"content": "int x;", "license": "MIT"}, "unknown", "", "int x;\nMIT"),
    ],
)
def test_language_from_a_column_or_from_fences(
    row: dict[str, str], language: str, instruction: str, answer: str
) -> None:
    document = read_document(Record(0, 1, json.dumps(row).encode()), "x.jsonl")
    assert document.language == language
    assert document.instruction.endswith(instruction)
    assert answer in document.answer


@pytest.mark.slow
def test_nearest_documents_and_categories() -> None:
    from reflectron.tools.data.analyse import analyse

    tasks = load_benchmark(HUMAN_EVAL)
    copied = next(task.text for task in tasks if (task.task_id, task.part) == ("HumanEval/3", "solution"))
    texts = [QUERIES, f"My account:\n{copied}", "Zzz."]
    found = analyse([Document("x", i, "python", "", text) for i, text in enumerate(texts)], tasks)
    assert (found.nearest[0].task_id, found.nearest[0].document) == ("HumanEval/3", 1)
    assert found.cosines.argmax() == 1
    assert found.cosines[2] == 0.0
    assert found.categories["Databases and SQL"] == 1
    assert found.categories["none"] == 1
    assert len(found.nearest) == 8


@pytest.mark.slow
def test_the_page_is_complete_in_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"lang": "python", "problem": f"{QUERIES} {n} <script>", "solution": f"x = {n}"} for n in range(20)]
    data = tmp_path / "x.jsonl"
    data.write_text("\n".join(map(json.dumps, [*rows, {"n": 1}])), encoding="utf-8")
    page = tmp_path / "page.html"
    assert cli.main(["data", "analyse", str(data), "--humaneval", HUMAN_EVAL, "--out", str(page)]) == 0
    assert "20 documents, 1 unreadable" in capsys.readouterr().out
    sources: list[str] = []
    tags: set[str] = set()

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            tags.add(tag)
            sources.extend(value or "" for name, value in attributes if name in ("src", "href"))

    Reader().feed(page.read_text(encoding="utf-8"))
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not tags & {"script", "link"}
