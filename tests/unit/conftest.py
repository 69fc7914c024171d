"""The plain kernel of packed rows is a helper of ``tests/distributed`` as well."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "distributed"))
