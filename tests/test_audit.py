"""The audit of the dependencies: what is bad ends it, what was not looked at is said aloud."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launch import ROOT

GOOD = {"name": "a", "version": "1", "vulns": []}
BAD = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
UNKNOWN = {"name": "c", "skip_reason": "not found"}


def audit(folder: Path, dependencies: list[dict[str, Any]] | None, code: int = 0) -> tuple[int, str]:
    """Status and output with a pip-audit that reports `dependencies`, or nothing, and ends with `code`."""
    report = json.dumps({"dependencies": dependencies})
    write = "" if dependencies is None else f"Path(sys.argv[-1]).write_text({report!r})"
    stand_in = folder / "pip-audit"
    stand_in.write_text(f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\n{write}\n"
                        f"print('no network')\nsys.exit({code})\n")  # fmt: skip
    stand_in.chmod(0o755)
    return run(str(folder))


def run(path: str) -> tuple[int, str]:
    command = [sys.executable, str(ROOT / "scripts" / "audit.py")]
    done = subprocess.run(command, env={"PATH": path}, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("dependencies", "code", "status", "said"),
    [
        ([GOOD, UNKNOWN], 0, 0, "1 of 2 packages audited, 0 of them"),
        ([GOOD, BAD], 1, 1, "b 2: CVE-1, fixed in 3"),
        ([UNKNOWN, UNKNOWN], 0, 0, "NOT AUDITED: the service knows none of the 2 packages"),
        (None, 1, 0, "NOT AUDITED: pip-audit ended with 1: no network"),
    ],
)
def test_what_the_audit_makes_of_a_report(dependencies, code, status, said, tmp_path):
    found, output = audit(tmp_path, dependencies, code)
    assert found == status
    assert said in output


def test_without_pip_audit(tmp_path):
    assert run(str(tmp_path)) == (
        0,
        "#################### DEPENDENCIES WERE NOT AUDITED: pip-audit is not installed (pip install pip-audit) "
        "####################\n",
    )
