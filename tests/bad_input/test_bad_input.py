"""Every wrong input that there is a table of: exit status 2, one short message, nothing written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bigsae.commands import run_command
from tests.bad_input import caches, checkpoints, commands, config_files, datasets, saes, train_options
from tests.bad_input.cases import Case, check_message, content, main_of, make_home

TABLES = {
    "train": train_options.CASES,
    "config": config_files.CASES,
    "dataset": datasets.CASES,
    "checkpoint": checkpoints.CASES,
    "sae": saes.CASES,
    "cache": caches.CASES,
    "command": commands.CASES,
}
CASES: dict[str, Case] = {
    f"{kind}, {name}": case for kind, table in TABLES.items() for name, case in table.items()
}
BEGUN = {"out", "out/config.json", "out/status.json"}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return make_home(tmp_path_factory.mktemp("bad"))


@pytest.mark.parametrize("name", CASES)
def test_refused(name, home, tmp_path, monkeypatch, capsys):
    case = CASES[name]
    arguments = case.command_line(home, tmp_path)
    before = content(tmp_path), content(home)
    monkeypatch.setattr(sys, "argv", [f"bigsae.{case.command}", *arguments])
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_command(main_of(case.command))
    output = capsys.readouterr()
    assert ended.value.code == 2
    check_message(case, output.err, tmp_path)
    after = content(tmp_path), content(home)
    assert after[1] == before[1]
    if case.begun:
        assert after[0].keys() - before[0].keys() == BEGUN
    else:
        assert after[0] == before[0]
        assert not output.out


def test_the_tables_are_large_and_of_every_command():
    assert len(CASES) >= 100
    commands = {case.command for case in CASES.values()}
    assert commands == {"train", "plan", "evaluate", "report", "cache_activations", "export", "pretokenize"}
