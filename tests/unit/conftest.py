"""Helpers beside the tests, and the plain kernel of packed rows, which is one of ``tests/distributed`` as well."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "distributed")]
