"""The data factory makes the quickstart's reflection samples: their model is scripted, their programs really run.

By default a part of them; ``REFLECTRON_FACTORY_SAMPLES`` names another number, 0 all.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reflectron.tools.data.reflection.programs import has_tests
from reflectron.tools.llm.scripted_server import Scripted, ScriptedServer
from reflectron.tools.sandbox.wall import SandboxKind
from testkit.places import ROOT

DATA = ROOT / "examples" / "quickstart" / "data" / "reflection.jsonl"
SAMPLES = int(os.environ.get("REFLECTRON_FACTORY_SAMPLES", "12"))


def blocks(record: dict[str, Any], turn: int) -> list[tuple[str, str]]:
    return [(block["type"], block["content"]) for block in record["messages"][turn]["content"]]


def records_with_assertions() -> dict[str, dict[str, Any]]:
    """By problem, the shipped samples whose last program has assertions, as the factory asks for them."""
    records = map(json.loads, DATA.read_text(encoding="utf-8").splitlines())
    found = {
        blocks(record, 2)[0][1]: record
        for record in records
        if has_tests([content for kind, content in blocks(record, 1) if kind == "code"][-1])
    }
    return dict(itertools.islice(found.items(), SAMPLES or None))


def speak(records: dict[str, dict[str, Any]], body: dict[str, Any]) -> Scripted:
    """What the sample says next: the text before its next program, and the program; in the end its answer."""
    messages = body["messages"]
    record = records[messages[1]["content"].split("\n\n", 1)[1]]
    if messages[-1]["content"].startswith("All tests pass."):
        return Scripted(text=blocks(record, 3)[0][1])
    said = [pair for pair in itertools.pairwise(blocks(record, 1)) if pair[1][0] == "code"]
    (_, text), (_, code) = said[len(messages) // 2 - 1]
    return Scripted(text=f"{text}\n\n```python\n{code}\n```")


@pytest.mark.slow
def test_the_quickstart_can_be_made_by_the_factory(tmp_path: Path, sandbox: SandboxKind) -> None:
    records = records_with_assertions()
    problems, out = tmp_path / "problems.jsonl", tmp_path / "out"
    problems.write_text("".join(json.dumps({"instruction": text}) + "\n" for text in records), encoding="utf-8")
    with ScriptedServer(lambda body: speak(records, body)) as server:
        words = ["data", "reflect", str(problems), "--out", str(out), "--endpoint", server.url, "--model", "scripted"]
        done = subprocess.run(
            [sys.executable, "-m", "reflectron.tools.cli", *words, "--concurrency", "2"], capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    made = [json.loads(line) for line in (out / "reflection.jsonl").read_text(encoding="utf-8").splitlines()]
    print(f"{len(made)} samples made and verified, of {len(records)} shipped ones with assertions")
    assert len(made) == len(records)
    for sample, shipped in zip(made, records.values(), strict=True):
        ours, theirs = ([b for b in blocks(record, 1) if b[0] == "code"] for record in (sample, shipped))
        assert ours == theirs
        assert blocks(sample, 3) == blocks(shipped, 3)
        # What the last program printed, as the shipped execution recorded it.
        assert [b[1].strip() for b in blocks(sample, 1) if b[0] == "execution"][-1] == [
            b[1].strip() for b in blocks(shipped, 1) if b[0] == "execution"
        ][-1]
