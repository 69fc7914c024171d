"""Packaging: the top-level folders install as ``reflectron.engine``, ``reflectron.kernels`` and ``reflectron.tools``.

The folders themselves carry no ``__init__.py``: a top-level package named ``kernels`` would shadow the one that
transformers imports. The packages inside them do.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
DATA = [
    # The interpreter in which model-written code runs (bubblewrap, its wall, is a package of the system), and the
    # client of the model that writes it.
    "jupyter_client>=8,<9",
    "ipykernel>=6.29,<8",
    "pyzmq>=25",
    "openai>=2,<4",
    "tenacity>=8.2,<10",
    # Decontamination and the analysis page.
    "pyahocorasick>=2,<3",
    "scikit-learn>=1.3,<2",
]
# What `transformers serve` needs: tests ask a real server.
SERVER = ["fastapi>=0.110,<1", "uvicorn>=0.29,<1", "accelerate>=1,<2"]
# Exactly: its verdicts are what published numbers are made of, and its judge is called from inside.
# It holds protobuf below 6, with which later releases of sentencepiece cannot be imported, though they do not say so.
EVAL = ["evalplus==0.3.1", "openai>=2,<4", "tenacity>=8.2,<10", "scipy>=1.10,<2", "sentencepiece>=0.2,<0.2.1"]
WANDB = ["wandb>=0.16,<1"]
# Fused layers where transformer-engine is not. Below 0.9, for the engine calls its operations rather than its modules.
FUSED = ["liger-kernel>=0.8.5,<0.9", "triton>=3.4,<3.8"]
ROOMS = ("engine", "kernels", "tools")
# What commands read stands beside the code that reads it.
READ = ("json", "jsonl", "yaml", "txt", "md", "html", "css", "csv", "model")


def packages() -> list[str]:
    """Import names of the three rooms and of every package inside them, at any depth."""
    inside = [f"{room}.{name}" for room in ROOMS for name in find_packages(str(ROOT / room))]
    return [f"reflectron.{name}" for name in (*ROOMS, *inside)]


setup(
    name="reflectron",
    version="0.1.0",
    description="Megatron-style training engine for ReflectionCoder and Magicoder",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.13",
    packages=packages(),
    package_dir={f"reflectron.{room}": room for room in ROOMS},
    package_data={f"reflectron.{room}": [f"**/*.{ending}" for ending in READ] for room in ROOMS},
    install_requires=[
        # Above 2.13 is untried; every older release that megatron-core accepts is allowed.
        "torch>=2.6,<2.14",
        # Exactly: the engine hooks into its layers and schedules.
        "megatron-core==0.16.1",
        "numpy>=1.26,<3",
        # `assert_never`, which Python 3.10 does not have.
        "typing_extensions>=4.10,<5",
        "transformers>=4.48,<6",
        "tokenizers>=0.21,<1",
        "sentencepiece>=0.2,<0.3",
        "safetensors>=0.4,<1",
        "pyarrow>=15,<30",
        # Older ones run the loading script of a dataset of the hub.
        "datasets>=4,<6",
        "omegaconf>=2.3,<3",
        "PyYAML>=6,<7",
        "packaging>=23,<28",
        "rich>=13,<16",
        "tensorboard>=2.15,<3",
        "psutil>=5.9,<8",
        "matplotlib>=3.7,<4",
    ],
    # transformer-engine, flash-attn and NVIDIA's Apex are built against the machine's CUDA and torch, so pip cannot
    # choose them; `reflectron doctor` says which are there. The package "apex" on PyPI is another project.
    extras_require={
        # Triton as torch's CUDA builds pin it: newer ones are compiled and tuned for with the torch that brings them.
        # ruff and mypy up to what the code was written with, or their next release breaks an unchanged project.
        "test": [
            "pytest>=8,<10",
            # A test builds a wheel: from here on it can without the package `wheel`.
            "setuptools>=70.1",
            "pytest-xdist>=3.7,<4",
            "ruff>=0.6,<0.18",
            "mypy>=1.10,<2.5",
            *FUSED,
            *DATA,
            *EVAL,
            *SERVER,
            *WANDB,
        ],
        "fused": FUSED,
        "data": DATA,
        "eval": EVAL,
        "wandb": WANDB,
        # The peers of `reflectron bench head` and `bench corpus`, and the reading of the SM clock.
        "bench": [
            "datasketch>=2,<3",
            *FUSED,
            "orda-kernel>=0.1,<1",
            "cut-cross-entropy>=25.1,<27",
            "nvidia-ml-py>=12,<14",
        ],
    },
    entry_points={"console_scripts": ["reflectron = reflectron.tools.cli:main"]},
)
