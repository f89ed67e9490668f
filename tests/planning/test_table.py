"""The table of docs/plan.md is what the plan says today."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import plan_table  # noqa: E402


def test_the_page_s_table():
    page = (ROOT / "docs" / "plan.md").read_text()
    assert page.split(plan_table.BEGIN)[1].split(plan_table.END)[0] == plan_table.table(), (
        "run python scripts/plan_table.py --write"
    )
