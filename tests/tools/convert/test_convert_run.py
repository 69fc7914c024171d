"""A checkpoint of a training run becomes its export, and ``verify`` sees what differs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from testkit.places import ROOT

QUICKSTART = ROOT / "examples" / "quickstart" / "train.yaml"

pytestmark = pytest.mark.slow


def reflectron(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "reflectron.tools.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=QUICKSTART.parents[2])


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of the quickstart on two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("run")
    small = ["train.steps=2", "batch.global_batch_size=2", "checkpoint.save_every=2", "seed=3"]
    done = reflectron("train", str(QUICKSTART), f"output_dir={folder}", *small)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def converted(run_folder: Path) -> Path:
    """Its checkpoint in Hugging Face format."""
    out = run_folder / "converted"
    done = reflectron("convert", "dist-to-hf", str(run_folder / "checkpoints" / "step_00000002"), str(out))
    assert done.returncode == 0, done.stderr
    return out


def test_a_checkpoint_becomes_the_export(run_folder: Path, converted: Path) -> None:
    exported, found = (load_file(folder / "model.safetensors") for folder in (run_folder / "export", converted))
    assert found.keys() == exported.keys()
    assert all(torch.equal(found[name], exported[name]) for name in exported)
    for path in (run_folder / "export").iterdir():
        if path.suffix != ".safetensors":
            assert (converted / path.name).read_bytes() == path.read_bytes()


def verify(*words: str) -> tuple[int, dict[str, Any]]:
    out = Path(words[1]) / "comparison.json"
    done = reflectron("convert", "verify", *words, "--json", str(out))
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(out.read_text(encoding="utf-8"))


def test_equal_checkpoints_pass(run_folder: Path, converted: Path) -> None:
    code, found = verify(str(run_folder / "checkpoints" / "step_00000002"), str(converted))
    assert code == 0
    assert found["different_tensors"] == found["largest_logit_difference"] == 0
    assert found["sha256"][0] == found["sha256"][1]
    assert found["tokens"] > 50


def test_the_logit_difference_is_transformers(converted: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    changed, text = tmp_path / "changed", tmp_path / "text.py"
    shutil.copytree(converted, changed)
    tensors = load_file(changed / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    text.write_text("def double(x):\n    return 2 * x\n", encoding="utf-8")
    code, found = verify(str(converted), str(changed), "--text", str(text))
    assert code == 1
    assert (found["different_tensors"], found["where"]) == (1, name)

    ids = AutoTokenizer.from_pretrained(converted)(text.read_text(), add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids.input_ids).logits
            for folder in (converted, changed)
        ]
    assert found["tokens"] == ids.input_ids.shape[1]
    expected = (logits[0] - logits[1]).abs().max().item()
    assert expected > 1e-3, "a difference of this size makes the tolerance mean something"
    assert found["largest_logit_difference"] == pytest.approx(expected, abs=1e-5)
    assert verify(str(converted), str(changed), "--text", str(text), "--tolerance", str(2 * expected))[0] == 0


def test_a_flipped_bit_is_found(run_folder: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step_00000002"
    shutil.copytree(run_folder / "checkpoints" / "step_00000002", checkpoint)
    file = checkpoint / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    done = reflectron("convert", "dist-to-hf", str(checkpoint), str(tmp_path / "out"))
    assert done.returncode == 2
    assert f"{file} is damaged" in done.stderr
