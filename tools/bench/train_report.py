"""placeholder"""

from pathlib import Path


def write_report(rows, folder: Path) -> str:
    return str(len(rows))
