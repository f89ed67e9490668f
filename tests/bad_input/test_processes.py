"""The same by `python -m`, and on two ranks of `accelerate launch`, where one message is printed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import datasets
import pytest

from tests.bad_input.cases import Case, check_message, content, make_home, train
from tests.bad_input.test_bad_input import CASES
from tests.launch import TWO_RANKS, run

SAMPLE = (
    "train, k beyond d_sae",
    "config, code",
    "checkpoint, metadata with code",
    "sae, a zip bomb",
    "command, export: a folder in use",
    "command, pretokenize: one token a row",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return make_home(tmp_path_factory.mktemp("bad"))


@pytest.mark.parametrize("name", SAMPLE)
def test_by_python(name, home, tmp_path):
    case = CASES[name]
    arguments = case.command_line(home, tmp_path)
    before = content(tmp_path), content(home)
    code, output = run((sys.executable, "-m", f"bigsae.{case.command}"), arguments)
    assert code == 2, output
    check_message(case, output, tmp_path)
    assert (content(tmp_path), content(home)) == before


def odd_rows(home: Path, tmp: Path) -> None:
    """Of two shards, one for each rank, that of the second rank alone has an id that the model does not know."""
    rows = [list(range(5, 21)) for _ in range(40)]
    rows[31][7] = 99_999
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(str(tmp / "data"))


ON_TWO = {
    "before the model is loaded": train(r"--sae\.k 65 exceeds d_sae 64: raise --sae\.d-sae", sae__k=65),
    "by one rank, in its data": train(
        r"--dataset .* holds token id 99999, but --model .*another model", odd_rows, dataset="{tmp}/data"
    ),
}


@pytest.mark.parametrize("name", ON_TWO)
def test_on_two_ranks_it_is_printed_once_by_the_first(name, home, tmp_path):
    case: Case = ON_TWO[name]
    code, output = run(TWO_RANKS, case.command_line(home, tmp_path))
    assert code != 0
    said = [line for line in output.splitlines() if line.startswith("error")]
    assert len(said) == 1, output
    assert said[0].startswith("error: "), output  # a rank but the first says which it is
    check_message(case, said[0], tmp_path)
    assert len(re.findall(case.message, output)) == 1, output
    assert "bigsae/" not in output, output  # no traceback of ours
    if "before" in name:
        assert not (tmp_path / "out").exists()
