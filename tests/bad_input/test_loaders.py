"""Files that are mangled: whatever reads them gives what it should, or a UserError, and takes no more memory for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bad_input.cases import make_home
from tests.bad_input.mangled import LOADERS
from tests.launch import ROOT, environment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def counts(tmp_path_factory) -> dict[str, dict[str, int]]:
    """What came of each, in a process of its own: a crash there, or too much memory, ends no other test."""
    home = make_home(tmp_path_factory.mktemp("mangled"))
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "tests.bad_input.mangled", str(home)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", LOADERS)
def test_mangled_files_are_read_or_refused(counts, name):
    times = LOADERS[name][-1]
    assert sum(counts[name].values()) == times
    assert counts[name]["refused"] >= times // 4  # else it is not mangled enough to say anything


def test_a_harmful_pickle_is_not_run(tmp_path: Path):
    """Nowhere in these tests was what a pickle asked for done."""
    assert not (ROOT / "harm").exists() and not (tmp_path / "harm").exists()
