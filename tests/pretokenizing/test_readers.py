"""Other tools read what is written here, and training reads what they write."""

from __future__ import annotations

import json
import logging
import shutil
from types import SimpleNamespace

import datasets
import pytest
import transformers
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from bigsae.config import DataConfig, UserError
from bigsae.data import origin as origins
from bigsae.data.origin import check_origin, read_origin
from bigsae.data.tokens import TokenRows, load_tokenizer, open_dataset
from bigsae.pretokenizing.run import pretokenize_dataset
from tests.models import tiny_tokenizer
from tests.pretokenizing.corpus import configured, written


@pytest.fixture(scope="module")
def rows(home, tmp_path_factory):
    """Folder of rows of 16."""
    out = tmp_path_factory.mktemp("rows") / "out"
    pretokenize_dataset(configured(home, out))
    return out


def test_datasets_reads_it(home, rows, tmp_path):
    at_once = datasets.load_dataset(str(rows), cache_dir=str(tmp_path))
    assert list(at_once) == ["train"]
    streamed = datasets.load_dataset(str(rows), split="train", streaming=True)
    expected = written(rows)
    assert at_once["train"]["input_ids"][:] == [row["input_ids"] for row in streamed] == expected
    assert {len(row) for row in expected} == {16}
    pretokenize_dataset(configured(home, tmp_path / "saved", format="arrow"))
    saved = datasets.load_from_disk(str(tmp_path / "saved"))
    assert saved.split == "train"
    assert saved.with_format("torch")[3]["input_ids"].tolist() == expected[3]


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # SAELens's own
def test_saelens_trains_from_it(home, rows, tmp_path, monkeypatch):
    store_module = pytest.importorskip("sae_lens.training.activations_store")
    monkeypatch.setattr(store_module, "hf_hub_download", lambda dataset, name, **_: str(rows / name))
    load = datasets.load_dataset
    monkeypatch.setattr(
        store_module, "load_dataset", lambda path, **kwargs: load(path, cache_dir=str(tmp_path), **kwargs)
    )

    def store(tokenizer, context_size=16):
        return store_module.ActivationsStore(
            SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(device="cpu")), str(rows), streaming=False,
            hook_name="x", hook_head_index=None,
            context_size=context_size, d_in=4, n_batches_in_buffer=2, total_training_tokens=64, prepend_bos=True,
            store_batch_size_prompts=8, train_batch_size_tokens=4, normalize_activations="none", device="cpu",
            dtype="float32",
        )  # fmt: skip

    batch = store(load_tokenizer(str(home / "lm"))).get_batch_tokens()
    assert batch.tolist() == written(rows)[:8]
    other = load_tokenizer(str(home / "lm"))
    other.add_tokens(["another"])
    with pytest.raises(ValueError, match="does not match model tokenizer"):
        store(other)


def test_a_dataset_of_saelens_is_read(home, tmp_path, caplog):
    sae_lens = pytest.importorskip("sae_lens")
    runner = sae_lens.PretokenizeRunner(
        sae_lens.PretokenizeRunnerConfig(
            tokenizer_name=str(home / "lm"),
            dataset_path="json",
            data_files=[str(home / "corpus.jsonl")],
            context_size=16,
            num_proc=1,
            seed=1,
            save_path=str(tmp_path / "out"),
        )
    )
    expected = [row.tolist() for row in runner.run()["input_ids"]]
    data = DataConfig(num_shards=4, epochs=1)
    source = open_dataset(str(tmp_path / "out"), data)
    assert sorted(row.tolist() for row in TokenRows(source, None, 16, data, 0, 0, 1)) == sorted(expected)
    origin = read_origin(str(tmp_path / "out"), data)
    assert origin is not None
    check_origin(origin, "rows", str(home / "lm"), load_tokenizer(str(home / "lm")), 16)
    shutil.copytree(home / "lm", tmp_path / "copy")  # the same tokenizer by another name
    check_origin(origin, "rows", str(tmp_path / "copy"), load_tokenizer(str(tmp_path / "copy")), 16)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    other = load_tokenizer(str(home / "lm"))
    other.add_tokens(["another"])
    with pytest.raises(
        UserError, match=r"--dataset rows was tokenised with .*lm, whose vocabulary is not that of"
    ):
        check_origin(origin, "rows", "other", other, 16)
    with caplog.at_level(logging.WARNING):
        check_origin(origin | {"tokenizer_name": str(tmp_path / "absent")}, "rows", "other", other, 16)
    assert "cannot be loaded here" in caplog.text


def test_what_contradicts_the_run(home, rows, tmp_path, caplog):
    origin, tokenizer = read_origin(str(rows), DataConfig()), load_tokenizer(str(home / "lm"))
    assert origin is not None
    check_origin(origin, "rows", "lm", tokenizer, 16)
    assert not caplog.records
    with pytest.raises(
        UserError, match=r"^--ctx-len 17: the rows of --dataset rows hold 16 tokens: lower --ctx-len"
    ):
        check_origin(origin, "rows", "lm", tokenizer, 17)
    with caplog.at_level(logging.WARNING):
        check_origin(origin, "rows", "lm", None, 5)
    assert "hold 16 tokens; each gives 3 rows, of which only the first begins with" in caplog.text
    other = tiny_tokenizer(tmp_path / "other")
    other.add_tokens(["another"])
    with pytest.raises(UserError, match="whose vocabulary is not that of --model other"):
        check_origin(origin, "rows", "other", other, 16)
    assert transformers.AutoTokenizer.from_pretrained(home / "lm").get_vocab() == tokenizer.get_vocab()


def test_origins_that_are_broken_or_absent(tmp_path, monkeypatch, caplog):
    assert read_origin(str(tmp_path), DataConfig()) is None
    for text, match in (("{", "is not JSON"), ("[]", "is not a JSON object"), ("\udcff", "is not JSON")):
        (tmp_path / "sae_lens.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(UserError, match=match):
            read_origin(str(tmp_path), DataConfig())
    asked = []

    def download(*where, **how):
        asked.append((where, how))
        raise raised

    monkeypatch.setattr(origins, "hf_hub_download", download)
    raised = EntryNotFoundError("404")
    assert read_origin("someone/rows", DataConfig(revision="v2")) is None
    assert asked == [(("someone/rows", "sae_lens.json"), {"repo_type": "dataset", "revision": "v2"})]
    assert not caplog.records
    raised = LocalEntryNotFoundError("offline")
    assert read_origin("someone/rows", DataConfig()) is None
    assert "out of reach" in caplog.text
    (tmp_path / "rows.json").write_text(json.dumps({"context_size": "x", "tokenizer_name": 3}))
    monkeypatch.setattr(origins, "hf_hub_download", lambda *_, **__: str(tmp_path / "rows.json"))
    origin = read_origin("someone/rows", DataConfig())
    assert origin is not None
    check_origin(origin, "rows", "lm", None, 16)
