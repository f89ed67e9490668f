"""A call that is killed at any moment goes on, to the same bytes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from bigsae.pretokenizing import spool
from bigsae.pretokenizing.run import pretokenize_dataset
from tests.pretokenizing.corpus import configured, digests


class Killed(BaseException):
    pass


class Disk:
    """Counts what is put on disk for good; dies at the number `deadly`."""

    def __init__(self, patch):
        self.count, self.deadly = 0, None
        fsync, rename = os.fsync, Path.rename
        patch.setattr(os, "fsync", lambda descriptor: self._step(fsync, descriptor))
        patch.setattr(Path, "rename", lambda path, to: self._step(rename, path, to))

    def _step(self, call, *arguments):
        self.count += 1
        if self.count == self.deadly:
            raise Killed
        return call(*arguments)


@pytest.mark.parametrize(("format", "streaming"), [("parquet", False), ("arrow", True)])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(home, tmp_path, monkeypatch, format, streaming):
    disk = Disk(monkeypatch)
    config = configured(home, tmp_path / "whole", streaming, format=format, commit_tokens=400)
    pretokenize_dataset(config)
    expected, num_steps = digests(tmp_path / "whole"), disk.count
    assert num_steps > 60
    # On the way now and then, and at each of the last steps, where files move into place.
    for i, deadly in enumerate([*range(1, num_steps - 5, 15), *range(num_steps - 5, num_steps + 1)]):
        config = replace(config, output_dir=str(tmp_path / str(deadly)), resume=i % 2 == 1)
        disk.count, disk.deadly = 0, deadly
        with pytest.raises(Killed):
            pretokenize_dataset(config)
        disk.deadly = None
        if (tmp_path / str(deadly) / "state.json").is_file():  # `datasets` takes it for whole
            assert expected.keys() <= digests(tmp_path / str(deadly)).keys()
        pretokenize_dataset(replace(config, resume=True))
        assert digests(tmp_path / str(deadly)) == expected, deadly


def test_finished_work_is_not_done_again(home, tmp_path, monkeypatch):
    tokenised = []
    encoder = spool.encoder

    def counted(tokenizer, layout):
        encode = encoder(tokenizer, layout)
        return lambda texts: tokenised.extend(texts) or encode(texts)

    monkeypatch.setattr(spool, "encoder", counted)
    config = configured(home, tmp_path / "whole", commit_tokens=400)
    pretokenize_dataset(config)
    num_texts = len(tokenised)
    disk = Disk(monkeypatch)
    config = configured(home, tmp_path / "cut", commit_tokens=400)
    disk.deadly = 24  # a dozen commits
    with pytest.raises(Killed):
        pretokenize_dataset(config)
    tokenised.clear()
    disk.deadly = None
    pretokenize_dataset(replace(config, resume=True))
    assert 0 < len(tokenised) < num_texts * 0.8
    tokenised.clear()
    pretokenize_dataset(replace(config, resume=True))
    assert not tokenised
