"""``reflectron doctor``: report which software and hardware is here, what is missing, and what that means for a run.

Each package is imported, not only looked up: an extension built for another torch is installed and still does not work.
Exit code 0 when everything that a plain install requires is present in a version it accepts, else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import platform
import subprocess
import warnings
from dataclasses import dataclass

from reflectron.engine.files import installed_version, one_line
from reflectron.engine.terminal import console


@dataclass(frozen=True)
class Package:
    """Names a distribution, the module that shows it works, and what a run uses it for."""

    distribution: str
    module: str
    meaning: str


# Whether a package is required, and in which version, is not repeated here: the installed metadata says it.
PACKAGES = (
    Package("torch", "torch", "tensors, autograd, process groups"),
    Package("megatron-core", "megatron.core", "layers, pipeline schedules, distributed optimizer"),
    Package("transformers", "transformers", "reads configurations and tokenizers"),
    Package("tokenizers", "tokenizers", "tokenizers from tokenizer.json"),
    Package("sentencepiece", "sentencepiece", "tokenizers from tokenizer.model"),
    Package("safetensors", "safetensors", "checkpoints in and out"),
    Package("pyarrow", "pyarrow", "token store, Parquet files"),
    Package("datasets", "datasets", "datasets named by their hub id"),
    Package("omegaconf", "omegaconf", "YAML configuration"),
    Package("PyYAML", "yaml", "YAML itself"),
    Package("packaging", "packaging", "compares versions"),
    Package("typing_extensions", "typing_extensions", "choices that a type checker holds to be exhaustive"),
    Package("numpy", "numpy", "token ids, packing"),
    Package("rich", "rich", "progress and tables"),
    Package("tensorboard", "tensorboard", "event files under <output_dir>/tensorboard"),
    Package("psutil", "psutil", "cores and memory of this machine"),
    Package("matplotlib", "matplotlib", "plots"),
    Package("jupyter_client", "jupyter_client", "talks to Python kernels; needed only to make data"),
    Package("ipykernel", "ipykernel", "Python kernels; needed only to make data"),
    Package("transformer-engine", "transformer_engine.pytorch", "fused layers and FP8 on GPU; without it Liger's"),
    Package("liger-kernel", "liger_kernel.ops.swiglu", "fused norms, SwiGLU and rotation on GPU; without it torch's"),
    Package("flash-attn-3", "flash_attn_interface", "attention on packed sequences on Hopper; without it another"),
    Package(
        "flash-attn-4", "flash_attn.cute", "attention on packed sequences on Hopper, Blackwell; without it another"
    ),
    Package("flash-attn", "flash_attn", "attention on packed sequences on GPU; without it torch's"),
    Package(
        "apex",
        "apex.multi_tensor_apply",
        "fused clipping and AdamW on GPU; without it torch's. Build NVIDIA's source: PyPI's apex is another project",
    ),
    Package("triton", "triton", "fused kernels on GPU; without it the plain-torch reference"),
    Package("openai", "openai", "asks a model behind an endpoint; needed only to make data"),
    Package("tenacity", "tenacity", "retries after a failure; needed only to make data"),
    Package("evalplus", "evalplus", "HumanEval+ and MBPP+; needed only to evaluate"),
    Package("pyahocorasick", "ahocorasick", "needed only for `reflectron data decontaminate`"),
    Package("scikit-learn", "sklearn", "needed only for `reflectron data analyse`"),
    Package("wandb", "wandb", "logs to Weights & Biases; needed only with train.wandb_project"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print the table; return 1 when a required package is missing, broken or of a wrong version."""
    from rich.table import Table
    from rich.text import Text

    table = Table("", "version", "state", "what it means", title="reflectron doctor")
    table.add_row("python", platform.python_version(), "ok", "runs everything")
    required = requirements()
    sound = True
    for package in PACKAGES:
        version, fault = examine(package, required.get(package.distribution))
        sound = sound and (fault is None or package.distribution not in required)
        colour = "green" if fault is None else "red" if package.distribution in required else "yellow"
        table.add_row(package.distribution, version, Text(fault or "ok", style=colour), package.meaning)
    table.add_row("bubblewrap", *_sandbox())
    table.add_row("device", *_device())
    console().print(table)
    print("\n".join(_backends()))
    if not sound:
        print(
            "A required package is missing, broken or of a wrong version: repair with pip install -e . from the clone."
        )
    return 0 if sound else 1


def examine(package: Package, accepted: str | None) -> tuple[str, str | None]:
    """Return the version of a package and what is wrong with it.

    Args:
        package: what to look for.
        accepted: version specifier of a required package such as ``>=2.6,<2.14``, None for an optional one.

    Returns:
        The version, empty when missing, and the fault, None when there is none.
    """
    from packaging.specifiers import SpecifierSet

    version = installed_version(package.distribution)
    if version is None:
        return "", "not installed" if accepted is None else "missing"
    if accepted is not None and not SpecifierSet(accepted).contains(version, prereleases=True):
        return version, f"expected {accepted}"
    try:
        # Libraries talk while they are imported; the table is the message here.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            importlib.import_module(package.module)
    except Exception as error:  # whatever a broken extension raises is the finding
        return version, f"broken: {one_line(error)}"
    return version, None


def requirements() -> dict[str, str]:
    """Return the version specifier of every distribution that a plain install of reflectron requires."""
    from packaging.requirements import Requirement

    requirements = map(Requirement, importlib.metadata.requires("reflectron") or [])
    return {req.name: str(req.specifier) for req in requirements if req.marker is None}


def _sandbox() -> tuple[str, str, str]:
    """Return version, state and meaning of the wall around model-written code."""
    from reflectron.tools.sandbox.process import choose_sandbox

    try:
        choose_sandbox("bubblewrap", i_understand=False)
    except ValueError as error:
        return "", "not usable", str(error)
    version = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    return version, "ok", "the wall around model-written code, for `data` and `eval`"


def _backends() -> list[str]:
    """Return what ``auto`` chooses on this machine for a model of any size."""
    try:
        import torch

        from reflectron.engine.model.backends.choose import choose_backends
    except ImportError as error:
        return [f"backends: {error}"]
    from reflectron.engine.config import Config

    return choose_backends(Config(), None, torch.device("cuda" if torch.cuda.is_available() else "cpu")).lines()


def _device() -> tuple[str, str, str]:
    """Return version, state and meaning of the accelerator."""
    try:
        import torch
    except ImportError:
        return "", "unknown", "torch cannot be imported"
    if not torch.cuda.is_available():
        return "", "cpu", "no CUDA device: runs train on the CPU, over gloo"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"CUDA {torch.version.cuda}", "ok", f"{len(names)} x {names[0]}, {memory_gib:.0f} GiB each"


SUBCOMMANDS = {"": (add_arguments, run)}
