"""What the documentation names is there: files, and the flags of a run on several nodes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from tests.test_migration import flags_of

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.md"))]
SBATCH = {"--nodes"}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_files_that_are_named_exist(page):
    text = page.read_text()
    named = re.findall(
        r"\b((?:accelerate_configs|benchmarks|bigsae|docs|examples|scripts|tests)/[\w/.-]*\w)", text
    )
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_flags_of_a_run_on_several_nodes():
    text = (ROOT / "docs" / "multi_node.md").read_text()
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text))
    launcher = {option for action in launch_command_parser()._actions for option in action.option_strings}
    unknown = flags - flags_of("train") - flags_of("plan") - launcher - SBATCH - {"--config"}
    assert not unknown
    assert len(flags) > 12
