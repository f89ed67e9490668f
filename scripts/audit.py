"""Known vulnerabilities of the versions in constraints.txt: `python scripts/audit.py`, with pip-audit on the PATH.

Ends with status 1 where there are some. Where pip-audit is not installed, or the service that it asks knows nothing or
is out of reach, that is said aloud and the status is 0: what was not looked at is neither good nor bad.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


def main() -> int:
    """Audit, and return the exit status."""
    if shutil.which("pip-audit") is None:
        return _not_audited("pip-audit is not installed (pip install pip-audit)")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        # Everything is pinned there: nothing is resolved or installed for it.
        command = ["pip-audit", "--requirement", str(CONSTRAINTS), "--no-deps", "--disable-pip",
                   "--progress-spinner", "off", "--format", "json", "--output", str(report)]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if not report.exists():
            return _not_audited(
                f"pip-audit ended with {done.returncode}: {' '.join(done.stdout.split())[-300:]}"
            )
        return _judged(json.loads(report.read_text())["dependencies"])


def _judged(packages: list[dict[str, Any]]) -> int:
    audited = [package for package in packages if "skip_reason" not in package]
    if not audited:
        return _not_audited(f"the service knows none of the {len(packages)} packages")
    for package in audited:
        for found in package["vulns"]:
            fixed = ", ".join(found.get("fix_versions", ())) or "no version yet"
            print(f"{package['name']} {package['version']}: {found['id']}, fixed in {fixed}")
    num_bad = sum(bool(package["vulns"]) for package in audited)
    print(f"{len(audited)} of {len(packages)} packages audited, {num_bad} of them with known vulnerabilities")
    return 1 if num_bad else 0


def _not_audited(why: str) -> int:
    print(f"{'#' * 20} DEPENDENCIES WERE NOT AUDITED: {why} {'#' * 20}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
