"""A real OpenAI-compatible server, ``transformers serve``, with a tiny model that has learnt one reflection sample.

The model writes that sample's blocks again, the interpreter runs them, and the same sample comes out: a checkpoint as
its own generator. The same server proves the chat protocol, where the model talks nonsense and is cut off.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reflectron.engine.data.sources import parse_record
from reflectron.engine.data.tokenization import render
from reflectron.engine.data.tokenizer import load_tokenizer
from reflectron.tools import cli
from reflectron.tools.data.reflection.dialogue import ReflectionProblem, show_tags
from reflectron.tools.sandbox.interpreter import Interpreter
from reflectron.tools.sandbox.wall import SandboxLimits
from testkit.places import ROOT
from testkit.scripted_generator import ANSWER, ATTEMPTS, RIGHT, SAID, TESTS, problem

QUICKSTART = ROOT / "examples" / "quickstart"

pytestmark = pytest.mark.slow


def sample() -> dict[str, Any]:
    """One failure, one repair, the answer; executions are what the interpreter prints."""
    text = problem(1)["instruction"]
    codes = [f"{ATTEMPTS[1]}\n\n{TESTS}", f"{RIGHT}\n\n{TESTS}\nprint('ok')"]
    with Interpreter("bubblewrap", SandboxLimits()) as interpreter:
        outputs = [interpreter.execute(code).text for code in codes]
    assert "AssertionError" in outputs[0]
    sequence = [
        {"type": kind, "content": content}
        for said, code, output in zip((SAID[0], SAID[2]), codes, outputs, strict=True)
        for kind, content in (("text", said), ("code", code), ("execution", output))
    ]
    turns = (
        ("user", [{"type": "text", "content": ReflectionProblem("", text, "").instruction()}]),
        ("assistant", sequence),
        ("user", [{"type": "text", "content": text}]),
        ("assistant", [{"type": "text", "content": ANSWER}]),
    )
    return {"messages": [{"role": role, "content": content} for role, content in turns], "type": "reflection"}


def memorise(record: dict[str, Any], folder: Path) -> None:
    """Train a tiny Llama on one sample until it knows it by heart, and export it."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    load_tokenizer(str(QUICKSTART / "tokenizer"), "reflection").save(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(render(parse_record(record))).input_ids])
    config = json.loads((QUICKSTART / "model" / "config.json").read_text())
    config |= {"vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config | {"num_attention_heads": 4}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.01:
            break
    assert loss.item() < 0.01
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def learnt() -> dict[str, Any]:
    """The sample that the served model knows."""
    return sample()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, learnt: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """URL of the server and name of its model."""
    pytest.importorskip("transformers.cli.serving.completion", reason="transformers 5 brought this interface")
    folder = tmp_path_factory.mktemp("served")
    memorise(learnt, folder / "export")
    show_tags(folder / "export", folder / "visible")
    serve = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
    command = [sys.executable, "-c", serve, "serve", str(folder / "visible"), "--host", "127.0.0.1", "--port", "0"]
    command += ["--device", "cpu", "--log-level", "info"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        seen = []
        try:
            for line in process.stderr:
                seen.append(line)
                if found := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
                    break
            else:
                pytest.fail("".join(seen))
            with (folder / "log").open("w") as log:
                drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=log)
                yield f"{found[1]}/v1", str(folder / "visible")
        finally:
            process.terminate()
        drain.wait()


def reflect(served: tuple[str, str], folder: Path, *more: str, code: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "in.jsonl").write_text(json.dumps(problem(1)) + "\n")
    words = ["data", "reflect", str(folder / "in.jsonl"), "--out", str(folder), "--interpreters", "1"]
    assert cli.main([*words, "--endpoint", served[0], "--model", served[1], "--temperature", "0", *more]) == code


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_trained_checkpoint_makes_its_own_sample(
    served: tuple[str, str], learnt: dict[str, Any], tmp_path: Path
) -> None:
    reflect(served, tmp_path, "--protocol", "tags", "--max-tokens", "300")
    assert not rows(tmp_path / "rejects.jsonl")
    [made] = rows(tmp_path / "reflection.jsonl")
    assert made["messages"] == learnt["messages"]
    attempts = rows(tmp_path / "attempts.jsonl")
    assert {row["usage"]["source"] for row in attempts} == {"server"}
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert (stats["rounds"], stats["failed_runs_repaired"]) == ({"2": 1}, 1)


def test_chat_protocol(served: tuple[str, str], tmp_path: Path) -> None:
    # An answer of four tokens is no program, and a run that made nothing says so.
    reflect(served, tmp_path, "--max-tokens", "4", code=1)
    [reject] = rows(tmp_path / "rejects.jsonl")
    assert reject["reason"].startswith(("truncated", "no code", "request failed: empty"))
    attempts = rows(tmp_path / "attempts.jsonl")
    assert {row["outcome"] for row in attempts} <= {"truncated", "ok", "empty"}
    assert attempts[0]["usage"]["prompt_tokens"] > 100
