"""Files appear whole; what hands on what it is given is written to and stays what it is."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from reflectron.engine.files import is_stream, write_text


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (pipe, link):
        write_text(path, "said")
        assert os.read(reader, 10) == b"said"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    assert link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, pipe]


@pytest.mark.parametrize("to_file", [False, True])
def test_standard_output_may_be_named(tmp_path: Path, to_file: bool) -> None:
    program = "from pathlib import Path; from reflectron.engine.files import write_text; write_text(Path(%r), 'said')"
    command = [sys.executable, "-c", program % "/proc/self/fd/1"]
    if to_file:
        with (tmp_path / "out").open("wb") as out:
            subprocess.run(command, stdout=out, check=True)
        assert (tmp_path / "out").read_text() == "said"
    else:
        assert subprocess.run(command, capture_output=True, check=True).stdout == b"said"


def test_which_names_are_streams(tmp_path: Path) -> None:
    assert all(is_stream(Path(f"/dev/{name}")) for name in ("null", "stdout", "stderr", "fd/1"))
    (tmp_path / "file").touch()
    assert not any(is_stream(path) for path in (tmp_path / "file", tmp_path / "new", tmp_path))
