"""The command: training from what it writes, mistakes, a full disk, and kills on the real tokenizer."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bigsae
from bigsae import pretokenize, train
from bigsae.commands import run_command
from bigsae.data.tokens import load_tokenizer
from bigsae.pretokenizing import spool, workers
from tests.launch import environment, flags
from tests.models import tiny_llama
from tests.pretokenizing.corpus import digests, written

COMMAND = (sys.executable, "-m", "bigsae.pretokenize")


def arguments(home, out, **more):
    base = {
        "model": home / "lm", "dataset": home / "corpus.jsonl", "output_dir": out, "ctx_len": 16,
        "tokens_per_file": 320, "num_workers": 1, "data__num_shards": 4,
    }  # fmt: skip
    return flags(**{name: value for name, value in (base | more).items() if value is not None})


def call(monkeypatch, command_line, main=pretokenize.main):
    """Exit status of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["bigsae.pretokenize", *command_line])
    try:
        run_command(main)
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def test_training_from_the_rows(home, tmp_path, monkeypatch, capsys):
    tiny_llama(tmp_path / "lm", num_layers=2)
    rows = tmp_path / "rows"
    assert call(monkeypatch, arguments(home, rows, model=tmp_path / "lm")) == 0
    options = {
        "model": tmp_path / "lm", "dataset": rows, "output_dir": tmp_path / "run", "hookpoints": "model.layers.1",
        "tokens": 640, "batch_size_tokens": 64, "ctx_len": 16, "sae__k": 2, "sae__d_sae": 64, "data__num_shards": 2,
        "lm__dtype": "float32", "lm__micro_batch_rows": 2, "buffer__tokens": 128, "buffer__dtype": "float32",
    }  # fmt: skip
    assert call(monkeypatch, flags(**options), train.main) == 0
    sae = bigsae.load_sae(str(tmp_path / "run" / "model.layers.1"))
    assert sae.metadata["prepend_bos"] is True
    assert sae.metadata["context_size"] == 16
    capsys.readouterr()
    wrong = options | {"output_dir": tmp_path / "other", "ctx_len": 32}
    assert call(monkeypatch, flags(**wrong), train.main) == 2
    assert "--ctx-len 32: the rows of" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


MISTAKES = {
    "no such model": ({"model": "nowhere/at-all"}, "--model nowhere/at-all"),
    "no such dataset": ({"dataset": "absent.jsonl"}, "--dataset absent.jsonl"),
    "no such column": ({"data__text_column": "body"}, "--data.text-column body"),
    "no such token": ({"sequence_separator_token": "sep"}, "--sequence-separator-token sep: the tokenizer of"),
    "no token at all": ({"begin_batch_token": "first"}, "--begin-batch-token first: give one of bos, eos, sep, an id"),
    "an id too large": ({"begin_batch_token": 5000}, "--begin-batch-token 5000: give one of"),
    "auto where there is none": ({"begin_sequence_token": "auto"}, "--begin-sequence-token auto: give one of"),
    "a row of one": ({"ctx_len": 1}, "--ctx-len 1 must be at least 2"),
    "no shards": ({"data__num_shards": 0}, "--data.num-shards 0 must be at least 1"),
    "no workers": ({"num_workers": 0}, "--num-workers 0 must be at least 1"),
    "files below a row": ({"tokens_per_file": 15}, "--tokens-per-file 15 must be between --ctx-len 16 and"),
    "arrow to the Hub": ({"push_to_hub": "a/b", "format": "arrow"}, "--push-to-hub needs --format parquet"),
    "no repository": ({"push_to_hub": "rows"}, "--push-to-hub rows: write it as user/name"),
    "private for nothing": ({"private": True}, "--private does nothing without --push-to-hub"),
    "rows too long": ({"ctx_len": 250_000, "tokens_per_file": 250_000}, "tokens, less than one row of --ctx-len 25"),
    "shards too short": (
        {"ctx_len": 1500, "tokens_per_file": 1500},
        "spread over 4 virtual shards none has enough .*lower --data.num-shards",
    ),
    "rows again": ({"dataset": "rows.jsonl"}, "rows.jsonl holds input_ids already: bigsae.train reads it as it is"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_and_leave_nothing(home, tmp_path, monkeypatch, capsys, mistake):
    wrong, message = MISTAKES[mistake]
    if wrong.get("dataset") == "rows.jsonl":
        (tmp_path / "rows.jsonl").write_text('{"input_ids": [1, 2]}\n')
        wrong = {"dataset": tmp_path / "rows.jsonl"}
    assert call(monkeypatch, arguments(home, tmp_path / "out", **wrong)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_folders_that_are_refused(home, tmp_path, monkeypatch, capsys):
    def refused(message, out, **more):
        assert call(monkeypatch, arguments(home, out, **more)) == 2
        assert re.search(message, capsys.readouterr().err)

    (tmp_path / "file").write_text("text")
    refused("--output-dir .*file: .*choose a folder that can be written", tmp_path / "file")
    refused("--output-dir .*below: .*choose a folder that can be written", tmp_path / "file" / "below")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("text")
    refused("full holds thesis.txt and no tokens: choose an empty folder", tmp_path / "full", resume=True)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(spool.Spool, "commit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            call(patch, arguments(home, out))
    refused("out holds work that was interrupted: go on with --resume", out)
    refused("--ctx-len is 8, but 16 in --output-dir", out, ctx_len=8, resume=True)
    assert call(monkeypatch, arguments(home, out, resume=True)) == 0
    refused("out is whole already: go on with --resume", out)
    refused("--seed is 3, but 0 in --output-dir", out, seed=3, resume=True)
    assert call(monkeypatch, arguments(home, out, resume=True)) == 0


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_second_call_in_the_same_folder_is_refused(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workers, "SECONDS_TO_END", 0.2)
    statuses = []

    def second(*_):
        statuses.append(call(monkeypatch, arguments(home, tmp_path / "out", resume=True)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(spool.Spool, "commit", second)
        with pytest.raises(KeyboardInterrupt):
            call(patch, arguments(home, tmp_path / "out"))
    assert statuses == [2]
    assert "another bigsae.pretokenize is at work in it" in capsys.readouterr().err


FULL_DISK = """
set -eu
mount -t tmpfs -o size=8m tmpfs "$DISK"
head -c "$FILLER" /dev/zero > "$DISK/filler"
status=0
"$@" || status=$?
rm "$DISK/filler"
"$@" --resume
find "$DISK/out" -type f | wc -l
echo "status $status"
"""


@pytest.mark.slow
@pytest.mark.parametrize("free", ["4k", "100k", "300k"])
def test_a_full_disk_is_named_and_nothing_is_lost(home, tmp_path, free):
    """On a small file system of its own: full at once, while tokenising, while writing files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    namespace = ("unshare", "--user", "--map-root-user", "--mount")
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("this machine grants no mount namespaces")
    filler = 8 * 1024 - int(free.removesuffix("k"))
    texts = tmp_path / "long.jsonl"
    texts.write_text((home / "corpus.jsonl").read_text() * 40)
    made = arguments(home, disk / "out", dataset=texts, tokens_per_file=1 << 16)
    done = subprocess.run(
        [*namespace, "bash", "-c", FULL_DISK, "bash", *COMMAND, *made],
        env=environment() | {"DISK": str(disk), "FILLER": f"{filler}K"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split()[-2:] == ["status", "2"], done.stderr
    assert "out: no space left on its disk: free some, then go on with --resume" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_on_real_text_it_goes_on_to_the_same_bytes(quickstart_run, tmp_path, monkeypatch):
    """SmolLM2's tokenizer, 80 speeches, two workers, killed with SIGKILL once some rows are safe."""
    root = Path(__file__).parents[2] / ".quickstart"
    speeches = sorted((root / "sotu").glob("*.txt"))[:80]
    (tmp_path / "texts").mkdir()
    for speech in speeches:
        shutil.copy(speech, tmp_path / "texts")
    made = {
        "model": root / "SmolLM2-135M", "dataset": tmp_path / "texts", "ctx_len": 128, "tokens_per_file": 1 << 16,
        "data__num_shards": 8, "commit_tokens": 1 << 15,
    }  # fmt: skip
    assert call(monkeypatch, flags(**made, output_dir=tmp_path / "rows", num_workers=1)) == 0
    again = tmp_path / "again"
    command = [*COMMAND, *flags(**made, output_dir=again, num_workers=2, resume=True)]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    while not safe_rows(again):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < safe_rows(again) < len(written(tmp_path / "rows"))
    # At once: the workers of the killed call end by themselves.
    subprocess.run(command, env=environment(), stderr=subprocess.DEVNULL, check=True)
    assert digests(again) == digests(tmp_path / "rows")
    tokenizer = load_tokenizer(str(root / "SmolLM2-135M"))
    words = "".join(path.read_text() for path in speeches)
    for row in written(again)[:40]:
        assert row[0] == tokenizer.bos_token_id
        for part in tokenizer.decode(row[1:]).split(tokenizer.eos_token):
            assert part.strip("\ufffd") in words


def safe_rows(out):
    """Rows that a killed call leaves behind."""
    states = out.glob(".pretokenize/spool/[0-9]*.json")
    return sum(json.loads(path.read_text())["num_rows"] for path in states)
