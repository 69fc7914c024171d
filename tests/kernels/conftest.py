"""Helper modules of this folder can be imported."""

from __future__ import annotations

from dataclasses import replace

import pytest


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer and larger tiles for larger problems: the interpreter's time goes by the number of programs."""
    pytest.importorskip("triton")
    from reflectron.kernels import tuning

    monkeypatch.setattr(tuning, "INTERPRETER", replace(tuning.INTERPRETER, rows=64, columns=128))
