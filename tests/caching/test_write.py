"""What is written: the model's own activations, the same after any interruption; and what is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bigsae
from bigsae.cache_activations import main
from bigsae.caching import folder as cache_folder
from bigsae.caching import shards
from bigsae.commands import run_command
from bigsae.config import UserError
from bigsae.hub import files
from bigsae.training.run import Preempted
from bigsae.training.signals import StopSignal
from tests.caching.caches import CTX_LEN, DATA, HOOKPOINTS, cache_config, make_home


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = make_home(tmp_path_factory.mktemp("write"))
    bigsae.write_activations(cache_config(home, home / "cache"))
    return home


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_written_are_the_models_activations(home):
    cache = bigsae.open_activations(home / "cache")
    cache.verify()
    index = cache.index
    assert index.num_rows + index.num_heldout_rows == len(cache.num_kept)
    assert 6000 <= index.num_activations < 6000 + 4 * CTX_LEN
    assert index.num_heldout_rows == 16 and len(index.shards) == 8
    assert index.hookpoints == dict.fromkeys(HOOKPOINTS, 32)
    model = AutoModelForCausalLM.from_pretrained(home / "lm")
    special = AutoTokenizer.from_pretrained(home / "lm").all_special_ids
    for number in [*range(0, index.num_rows, 17), int(cache.heldout_rows()[-1, 0])]:
        ids, kept = cache.tokens(number)
        expected = ~torch.isin(ids, torch.tensor(special))
        expected[0] = False
        assert torch.equal(kept, expected) and 0 < int(kept.sum()) == cache.num_kept[number]
        with torch.no_grad():
            states = model(ids[None], output_hidden_states=True).hidden_states
        ours = cache(cache.as_rows([number]))["model.layers.1"][0]
        theirs = model.model.norm(ours)[: int(kept.sum())]  # the last of the hidden states is normalised
        torch.testing.assert_close(theirs, states[-1][0][kept], rtol=1e-4, atol=1e-5)
        assert not ours[int(kept.sum()) :].any()


def test_rows_kept_aside_come_in_the_order_of_their_documents(home):
    """As a run on the fly has them."""
    from bigsae.data import tokens

    cache = bigsae.open_activations(home / "cache", [HOOKPOINTS[1]])
    source = tokens.open_dataset(str(home / "corpus.jsonl"), DATA)
    rows = tokens.heldout_rows(source, AutoTokenizer.from_pretrained(home / "lm"), CTX_LEN, DATA, 3, 16)
    ours = [cache.tokens(number)[0] for number in cache.heldout_rows()[:, 0].tolist()]
    assert torch.equal(torch.stack(ours), rows)


class Killed(BaseException):
    """As if the process was no more."""


def killed_after(config: bigsae.CacheConfig, num_writes: int, monkeypatch) -> None:
    """Run `config` until so many files are written: the next one is left half written, under its temporary name."""
    left = num_writes

    def write_atomic(path, write, plain=files.write_atomic):
        nonlocal left
        left -= 1
        if left < 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f".{path.name}.tmp").write_bytes(b"half")
            raise Killed
        plain(path, write)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", write_atomic)
        patch.setattr(shards, "write_atomic", write_atomic)
        with pytest.raises(Killed):
            bigsae.write_activations(config)


def test_killed_at_any_file_and_resumed_it_is_the_same(home, tmp_path, monkeypatch):
    """A shard is two files and a note: before, within and after shards, and before the index."""
    config = cache_config(home, tmp_path / "one", hookpoints=HOOKPOINTS[2:], tokens=2500)
    bigsae.write_activations(config)
    straight = contents(tmp_path / "one")
    assert len(straight) == 2 + 2 * 4  # index and cache.json, four shards
    for num_writes in (0, 5, 9, 13):
        out = tmp_path / f"killed_{num_writes}"
        stopped = replace(config, output_dir=str(out))
        killed_after(stopped, num_writes, monkeypatch)
        finished = {name: data for name, data in contents(out).items() if name.endswith(".safetensors")}
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors") if path.name[0] != "."}
        rows = (
            None if num_writes else config.lm.micro_batch_rows
        )  # cache.json has them from the first shard on
        lm = replace(config.lm, micro_batch_rows=rows)
        bigsae.write_activations(replace(stopped, resume=True, lm=lm))
        assert contents(out).keys() == straight.keys()
        ours = contents(out) | {"cache.json": straight["cache.json"]}
        assert ours == straight
        if num_writes == 13:  # all shards were there: none was written anew
            assert len(finished) == 8
            assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_a_signal_keeps_what_is_whole(home, tmp_path, monkeypatch):
    config = cache_config(home, tmp_path / "cache", hookpoints=HOOKPOINTS[2:], tokens=2500)

    def later(self) -> StopSignal:
        numbers = iter([None] * 12)
        type(self).number = property(lambda _: next(numbers, 15))  # pyright: ignore[reportAttributeAccessIssue]
        return self

    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "__init__", lambda self: None)
        patch.setattr(StopSignal, "__enter__", later)
        patch.setattr(StopSignal, "__exit__", lambda *_: None)
        patch.setattr(StopSignal, "number", None, raising=False)
        with pytest.raises(Preempted):
            bigsae.write_activations(config)
    assert (tmp_path / "cache" / "progress" / "00000-0000.json").exists()
    assert not (tmp_path / "cache" / "index.json").exists()
    with pytest.raises(UserError, match=r"holds no index\.json: give the folder of a finished cache"):
        bigsae.open_activations(tmp_path / "cache")
    bigsae.write_activations(replace(config, resume=True))
    assert bigsae.open_activations(tmp_path / "cache").index.num_activations >= 2500


def test_the_data_may_end_before(home, tmp_path, caplog):
    config = cache_config(home, tmp_path / "all", hookpoints=HOOKPOINTS[2:], tokens=10**6)
    bigsae.write_activations(config)
    index = bigsae.open_activations(tmp_path / "all").index
    assert "the data ended after" in caplog.text
    assert 6000 < index.num_activations < 10**6
    bigsae.write_activations(replace(config, resume=True))
    assert "is finished: nothing to write" in caplog.text


def refused(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["bigsae.cache_activations", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        run_command(main)
    assert done.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_fit_is_refused_before_the_model_is_loaded(home, tmp_path, monkeypatch, caplog):
    monkeypatch.delattr("bigsae.caching.write.load_lm")
    usage = SimpleNamespace(free=(1 << 28) + 6000 * 3 * 32 * 4)
    monkeypatch.setattr(cache_folder, "shutil", SimpleNamespace(disk_usage=lambda _: usage))
    with pytest.raises(UserError, match=r"--output-dir .*--tokens 6000 at 3 hookpoints need .* GiB, but"):
        bigsae.write_activations(cache_config(home, tmp_path / "cache"))
    assert "at most" in caplog.text
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_is_a_message(home, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write_atomic", full)
    with pytest.raises(UserError, match=r"No space left on device.*--resume"):
        bigsae.write_activations(cache_config(home, tmp_path / "cache"))


def test_mistakes(home, tmp_path, monkeypatch, capsys):
    config = cache_config(home, home / "cache")
    for changed, message in (
        ({}, "already holds a cache: go on with --resume"),
        ({"resume": True, "tokens": 7000}, "--tokens is 7000, the cache in .* has 6000"),
        ({"output_dir": str(home / "lm")}, "holds other files"),
        ({"output_dir": str(tmp_path), "data": replace(DATA, epochs=2)}, r"--data\.epochs 2"),
        ({"output_dir": str(tmp_path), "shard_tokens": 0}, "--shard-tokens 0"),
        ({"output_dir": str(tmp_path), "private": True}, "--private does nothing without --push-to-hub"),
        ({"output_dir": str(tmp_path), "hookpoints": ("model.layer.1",)}, "nearest are model.layers"),
        ({"output_dir": str(tmp_path), "data": replace(DATA, heldout_documents=60)}, "heldout-documents 60"),
    ):
        with pytest.raises(UserError, match=message):
            bigsae.write_activations(replace(config, **changed))
    secret = replace(config.lm, kwargs='{"token": "hf_secret"}')
    with pytest.raises(UserError, match=r"--lm\.kwargs sets 'token'"):
        bigsae.write_activations(replace(config, output_dir=str(tmp_path / "s"), tokens=100, lm=secret))
    assert not (tmp_path / "s").exists()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / cache_folder.MADE).write_text('{"lm": {"micro_batch_rows": 0}}')
    unsaid = replace(config.lm, micro_batch_rows=None)
    with pytest.raises(UserError, match=r"--lm\.micro-batch-rows 0"):
        bigsae.write_activations(replace(config, output_dir=str(damaged), resume=True, lm=unsaid))
    assert "is missing" not in refused(monkeypatch, capsys, "--verify", str(home / "nowhere"))
    shard = home / "cache" / "activations" / HOOKPOINTS[2] / "00001-0000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    message = refused(monkeypatch, capsys, "--verify", str(home / "cache"))
    assert "00001-0000.safetensors is not what was written, its checksum differs" in message
