"""The sandbox as a user without privileges has it, in a user namespace, when root runs the tests."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

from reflectron.tools import sandbox as package
from reflectron.tools.sandbox.home import sandbox_folder
from reflectron.tools.sandbox.wall import SandboxKind

pytestmark = pytest.mark.slow
AS_NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", "-i"]
PROGRAM = """
import os, sys
from pathlib import Path
from reflectron.tools.sandbox.interpreter import Interpreter
from reflectron.tools.sandbox.home import sandbox_folder
from reflectron.tools.sandbox.wall import SandboxLimits
from reflectron.tools.sandbox.process import choose_sandbox, run_sandboxed

assert os.getuid() == 65534
kind = choose_sandbox("bubblewrap", False)
limits = SandboxLimits(wall_seconds=60, cpu_seconds=60)
with sandbox_folder() as folder:
    status = run_sandboxed(kind, ["cat", "/proc/self/status"], folder=folder, limits=limits).stdout
assert "CapEff:\\t0000000000000000" in status and "CapBnd:\\t0000000000000000" in status, status
assert "NoNewPrivs:\\t1" in status and "Seccomp:\\t2" in status, status
with Interpreter(kind, limits) as interpreter:
    assert interpreter.execute("x = 6 * 7\\nx").text == "42\\n"
    bomb = interpreter.execute("import os\\nwhile True:\\n    try: os.fork()\\n    except OSError: pass")
    assert bomb.status == "processes", bomb
    assert interpreter.execute("x").status == "error"
    sockets = interpreter.execute("import socket; socket.create_connection(('192.0.2.1', 80))")
    assert "unreachable" in sockets.text, sockets
    first = interpreter.execute(f"import os; print(os.path.exists('/proc/1/root' + {str(Path(__file__))!r}))")
    assert first.text == "False\\n", first
    # A folder that its owner cannot list could hide any number of files.
    hidden = interpreter.execute("import os, time; os.mkdir('d', 0o300); time.sleep(1000)")
    assert hidden.status == "disk", hidden
print("as an ordinary user")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: every other test of the sandbox runs as an ordinary user")
def test_in_a_user_namespace(sandbox: SandboxKind) -> None:
    with sandbox_folder() as folder:
        folder.chmod(0o755)
        python = python_for_all()
        subprocess.run([python, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        [packages] = (folder / "venv/lib").glob("python3*/site-packages")
        shutil.copytree(Path(package.__path__[0]), packages / "reflectron/tools/sandbox")
        (packages / "ours.pth").write_text("\n".join(entry for entry in sys.path if entry.endswith("-packages")))
        (folder / "program.py").write_text(PROGRAM)
        command = [*AS_NOBODY, folder / "venv/bin/python", "-W", "error::ResourceWarning", folder / "program.py"]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
        assert (done.returncode, done.stdout) == (0, "as an ordinary user\n"), done.stderr


def python_for_all() -> str:
    """A Python of this version that any user may start, with our packages readable."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for python in (getattr(sys, "_base_executable", sys.executable), f"/usr/bin/python{version}"):
        check = [*AS_NOBODY, python, "-c", f"import os, venv; os.listdir({site.getsitepackages()[0]!r})"]
        if Path(python).exists() and subprocess.run(check, capture_output=True, cwd="/", check=False).returncode == 0:
            return python
    pytest.skip(f"no Python {version} here that a user other than root may start")
