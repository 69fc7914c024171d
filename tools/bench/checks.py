"""``python -m reflectron.tools.bench.checks NAME FOLDER DEVICE``: one correctness stage of ``reflectron bench gpu``.

Writes a row for each number that was compared into ``FOLDER/rows.jsonl`` as soon as it is known; the exit code is 1
when one is worse than it may be, or none could be compared.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

Check = Literal["kernels", "parity", "step"]


def check_rows(name: Check, device_type: str) -> Iterable[dict[str, Any]]:
    """The rows of a check, one by one."""
    if name == "step":
        from reflectron.tools.bench.check_step import step_rows

        with tempfile.TemporaryDirectory() as scratch:
            yield from step_rows(device_type == "cuda", Path(scratch))
        return
    if device_type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which nothing has done yet
    import torch

    from reflectron.tools.bench.check_kernels import kernel_rows
    from reflectron.tools.bench.layer_parity import layer_parity
    from reflectron.tools.bench.parity import attention_parity

    if name == "parity":
        for dtype in ("bfloat16", "float32"):
            yield from attention_parity(torch.device(device_type), dtype)
            yield from layer_parity(torch.device(device_type), dtype)
        return
    yield from kernel_rows(torch.device(device_type))


def main(name: Check, folder: Path, device_type: str) -> int:
    """Compare, print what is wrong, and return the exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    compared, wrong = 0, 0
    with (folder / "rows.jsonl").open("x", encoding="utf-8") as file:
        for row in check_rows(name, device_type):
            file.write(json.dumps(row) + "\n")
            file.flush()
            if "passed" in row:
                compared += 1
                wrong += not row["passed"]
                if not row["passed"]:
                    place = ", ".join(row[key] for key in ("case", "backend", "dtype", "tensor"))
                    print(f"{place}: error {row['error']:.3g}")
    print(f"{name}: {compared} numbers compared, {wrong} wrong")
    return int(wrong > 0 or compared == 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))  # type: ignore[arg-type]
