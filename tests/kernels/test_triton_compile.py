"""The kernels compile for GPUs that are not there, and do not spill more registers than the tuning tables say."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

# Bytes a thread may store to spilled registers, in the epilogue of a tile. ptxas of Triton 3.7.1 reports for bf16 on
# sm_90: pairs 4 (52 with a temperature), unpaired rows 64; on sm_80 12 (48) and 0; fp16 at most 200; fp32 0.
SPILL_LIMIT = {"bf16": 96, "fp16": 224, "fp32": 0}
# A teacher with a matrix of its own keeps its logits through the student's products: 400 on sm_80, none more on sm_90.
SEPARATE_SPILL_LIMIT = 416
SHARED_MEMORY_LIMIT = {90: 232448, 80: 101376}  # the sm_80 tables serve sm_86 and sm_89 too, which have the least
TEACHER_FACTORS = ("teacher_hidden", "teacher_weight", "teacher_d")
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


CASES = list(itertools.product((90, 80), TYPES, ("usual", "other")))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str, str], list[dict[str, Any]]]:
    """By case, the figures of each kernel."""
    # A process of its own: where the interpreter is switched on there are no kernels to compile.
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("compiled"))}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return {case: json.loads(line) for case, line in zip(CASES, result.stdout.splitlines(), strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_kernels_compile_without_spilling(
    case: tuple[int, str, str], compiled: dict[tuple[int, str, str], list[dict[str, Any]]]
) -> None:
    capability, dtype, _ = case
    assert compiled[case]
    for figures in compiled[case]:
        print(figures)
        is_tile = figures["kernel"].endswith("_tile")
        limit = SPILL_LIMIT[dtype] if is_tile else 0
        if figures["separate"] and capability == 80 and dtype != "fp32":
            limit = SEPARATE_SPILL_LIMIT
        assert figures["spill_bytes"] <= limit, figures
        assert figures["shared_bytes"] <= SHARED_MEMORY_LIMIT[capability], figures
        if figures["kernel"] != "jsd_sums" and figures["keep"]:
            assert figures["wide_stores"], figures
        if is_tile and dtype != "fp32":
            assert figures["tensor_cores"], figures


def compile_all(capability: int, dtype: str, variants: str) -> Iterator[dict[str, Any]]:
    """The figures of every kernel."""
    from reflectron.kernels import decode, forward, tuning

    wide, usual = dtype != "bf16", variants == "usual"
    for kernel in (forward.pair_tile, forward.unpaired_tile):
        tile = tuning.forward_tile(kernel is forward.pair_tile, TYPES[dtype], divmod(capability, 10))
        constants: dict[str, Any] = {"KEEP": usual, "WIDE": wide, "DESCRIPTORS": tile.descriptors, "UPCAST": False}
        constants |= {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth}
        types = {"hidden": f"*{dtype}", "weight": f"*{dtype}"}
        if tile.descriptors:
            types["hidden"] = f"tensordesc<{dtype}[{tile.rows}, {tile.depth}]>"
            types["weight"] = f"tensordesc<{dtype}[{tile.columns}, {tile.depth}]>"
        shared = {**constants, "SEPARATE": False, **dict.fromkeys(TEACHER_FACTORS)}
        plain = {**shared, "TEMPERED": False}
        yield compile_one(kernel, capability, plain, types, tile.warps, tile.stages)
        if usual and kernel is forward.pair_tile:
            separate = {**constants, "TEMPERED": False, "SEPARATE": True}
            types |= {f"teacher_{name}": kind for name, kind in types.items()}
            yield compile_one(kernel, capability, separate, types, tile.warps, tile.stages)
        if not usual and kernel is forward.pair_tile:
            tempered = {**shared, "TEMPERED": True, "KEEP": True}
            yield compile_one(kernel, capability, tempered, types, tile.warps, tile.stages)
    columns = tuning.forward_tile(True, TYPES[dtype], divmod(capability, 10)).columns
    constants = {"WIDE": wide, "INTERPRETED": False, "BM": tuning.DECODE_ROWS, "BN": columns}
    for divergence in ("forward_kl",) if usual else ("reverse_kl", "jsd"):
        constants["DIVERGENCE"] = decode.divergence_constant(divergence).value
        yield compile_one(decode.pair_gradients, capability, constants, {}, tuning.DECODE_WARPS, 2)
    for kernel in (decode.unpaired_gradients,) if usual else (decode.jsd_sums,):
        yield compile_one(kernel, capability, constants, {}, tuning.DECODE_WARPS, 2)


def compile_one(
    kernel: Any, capability: int, constants: dict[str, Any], types: dict[str, str], warps: int, stages: int
) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {"label": "*i32", "codes": "*fp32" if constants["WIDE"] else "*i16"}
    pointers |= dict.fromkeys(("stats", "tile_max", "facts", "pair_facts", "sums"), "*fp32")
    floats = dict.fromkeys(("inverse_temperature", "beta", "code_range"), "fp32")
    signature = {
        name: "constexpr" if name in constants else {**pointers, **floats, **types}.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = ("d", "teacher_d", "code_stride")
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (name in aligned and kind != "constexpr")
    }
    used = {name: value for name, value in constants.items() if name in signature}
    compiled = triton.compile(
        ASTSource(kernel, signature, used, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    assembly = compiled.asm["ptx"]
    # A row times its stride passes 2^31 at 16k pairs on a vocabulary of 152k.
    assert not re.search(r"muli .*tensor<\d+x1xi32>", compiled.asm["ttir"]), f"32-bit row offsets: {kernel.__name__}"
    return {
        "kernel": kernel.__name__,
        "spill_bytes": spilled_bytes(assembly, capability),
        "shared_bytes": compiled.metadata.shared,
        "keep": constants.get("KEEP", True),
        "separate": constants.get("SEPARATE", False),
        "wide_stores": "st.global.v4.b32" in assembly,
        "tensor_cores": "wgmma.mma_async" in assembly if capability == 90 else "mma.sync" in assembly,
    }


def spilled_bytes(assembly: str, capability: int) -> int:
    """What ptxas, as it comes with Triton, reports of stores to spilled registers."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(assembly)
        architecture = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={architecture}", source, "-o", source.with_suffix(".o")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return max(int(value) for value in re.findall(r"(\d+) bytes spill stores", report))


if __name__ == "__main__":
    for one in CASES:
        print(json.dumps(list(compile_all(*one))))
