"""Going on from any row, on any number of ranks."""

from __future__ import annotations

import json
import time
from collections import Counter
from itertools import islice

import datasets
import pytest

from bigsae.config import DataConfig, UserError
from bigsae.data import packing, sources
from bigsae.data.opening import open_dataset
from bigsae.data.tokens import TokenRows, merge_states
from tests.data.corpora import KINDS, make_source, texts


def straight_run(rows):
    """All rows, and the state before each and at the end."""
    states, found = [json.dumps(rows.state_dict())], []
    for row in rows:
        found.append(row.tolist())
        states.append(json.dumps(rows.state_dict()))
    return found, states


def check_every_boundary(make):
    expected, states = straight_run(make())
    assert len(expected) > 20
    total = make()
    list(total)
    for i, state in enumerate(states):
        resumed = make()
        resumed.load_state_dict(json.loads(state))
        assert resumed.state_dict() == json.loads(state)
        assert [row.tolist() for row in resumed] == expected[i:]
        assert resumed.num_dropped_tokens == total.num_dropped_tokens
        assert resumed.num_skipped_documents == total.num_skipped_documents


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [0, 1])
def test_every_row_boundary(kind, rank, tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "WINDOW_DOCUMENTS", 16)  # several windows of 16 documents in each shard
    monkeypatch.setattr(packing, "PIECE_CHARACTERS", 150)  # several pieces in most documents
    source = make_source(kind, {"text": [*texts(90), "", None]})
    data = DataConfig(num_shards=3, epochs=2, heldout_documents=5)
    check_every_boundary(lambda: TokenRows(source, tokenizer, 97, data, 0, rank, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_boundary_of_input_ids(kind):
    ids = [[100 * i + j for j in range(i % 23)] for i in range(30)]
    source = make_source(kind, {"input_ids": ids})
    data = DataConfig(num_shards=3, epochs=2)
    check_every_boundary(lambda: TokenRows(source, None, 8, data, 0, 0, 1))


def test_every_row_boundary_of_rows_longer_than_all_the_text_of_a_shard(tokenizer):
    source = make_source("map", {"text": texts(6)})
    data = DataConfig(num_shards=3, epochs=20)
    check_every_boundary(lambda: TokenRows(source, tokenizer, 120, data, 0, 0, 1))


@pytest.mark.parametrize("num_files", [1, 4])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "txt"])
def test_every_row_boundary_of_streamed_files(suffix, num_files, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "WINDOW_DOCUMENTS", 16)
    documents = texts(70) if suffix != "txt" else texts(12)
    for i in range(num_files):
        part = datasets.Dataset.from_dict({"text": documents[i::num_files]})
        if suffix == "jsonl":
            part.to_json(tmp_path / f"{i}.jsonl")
        elif suffix == "parquet":
            part.to_parquet(tmp_path / f"{i}.parquet", batch_size=7)  # several row groups
        else:
            (tmp_path / f"{i}.txt").write_text("\n".join(part["text"]))
    data = DataConfig(num_shards=2, epochs=2, streaming=True)
    source = open_dataset(str(tmp_path), data)
    check_every_boundary(lambda: TokenRows(source, tokenizer, 120 if suffix != "txt" else 20, data, 0, 0, 1))


def test_the_state_does_not_run_ahead_with_the_thread(tokenizer):
    source = make_source("map", {"text": texts(60)})
    data = DataConfig(num_shards=3, epochs=1)
    expected, states = straight_run(TokenRows(source, tokenizer, 16, data, 0, 0, 1))
    rows = TokenRows(source, tokenizer, 16, data, 0, 0, 1)
    next(rows)
    deadline = time.monotonic() + 10
    while rows._queue.qsize() < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert rows._queue.qsize() >= 20
    assert json.dumps(rows.state_dict()) == states[1]
    rows.close()
    assert [row.tolist() for row in rows] == expected[1:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (1, 4), (4, 1)])
def test_another_number_of_ranks(kind, before, after, tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "WINDOW_DOCUMENTS", 16)
    source = make_source(kind, {"text": texts(200)})
    data = DataConfig(num_shards=4, epochs=2)
    expected = Counter(tuple(row.tolist()) for row in TokenRows(source, tokenizer, 32, data, 0, 0, 1))
    found: Counter[tuple[int, ...]] = Counter()
    states = []
    # The last of the ranks is in its second epoch, the first far behind it.
    for rank, share in enumerate((0.05, 0.3, 0.55, 0.8)[-before:]):
        rows = TokenRows(source, tokenizer, 32, data, 0, rank, before)
        num_rows = int(share * expected.total() / before)
        found.update(tuple(row.tolist()) for row in islice(rows, num_rows))
        states.append(json.loads(json.dumps(rows.state_dict())))
        rows.close()
    assert any(cursor["epoch"] == 1 for state in states for cursor in state["cursors"])
    merged = merge_states(states)
    for rank in range(after):
        rows = TokenRows(source, tokenizer, 32, data, 0, rank, after)
        rows.load_state_dict(merged)
        found.update(tuple(row.tolist()) for row in rows)
    assert found == expected


def test_a_state_is_small(tokenizer):
    source = make_source("map", {"text": [texts(1)[0] * 2000]})
    rows = TokenRows(source, tokenizer, 256, DataConfig(num_shards=1), 0, 0, 1)
    for _ in range(50):
        next(rows)
    assert len(json.dumps(rows.state_dict())) < 500
    rows.close()


def test_resume_reads_a_stream_from_its_window_on(tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "WINDOW_DOCUMENTS", 16)
    source = make_source("modulo", {"text": texts(400)})
    data = DataConfig(num_shards=4, epochs=1)
    rows = TokenRows(source, tokenizer, 32, data, 0, 0, 1)
    states = straight_run(rows)[1]
    late = json.loads(states[-1])
    anchors = {json.dumps(cursor["anchor"]) for cursor in late["cursors"]}
    assert json.dumps(json.loads(states[1])["cursors"][0]["anchor"]) not in anchors


def test_states_that_do_not_fit_are_refused(tokenizer):
    source = make_source("map", {"text": texts(40)})
    data = DataConfig(num_shards=4)
    state = TokenRows(source, tokenizer, 16, data, 0, 0, 1).state_dict()
    halves = [TokenRows(source, tokenizer, 16, data, 0, rank, 2).state_dict() for rank in range(2)]

    def load(source=source, ctx_len=16, data=data, seed=0, state=state):
        TokenRows(source, tokenizer, ctx_len, data, seed, 0, 1).load_state_dict(state)

    load()
    load(state=merge_states(halves))
    with pytest.raises(UserError, match="--seed is 1, but 0 in the checkpoint"):
        load(seed=1)
    with pytest.raises(UserError, match="--ctx-len is 17"):
        load(ctx_len=17)
    with pytest.raises(UserError, match=r"--data\.num-shards is 8"):
        load(data=DataConfig(num_shards=8))
    with pytest.raises(UserError, match=r"--data\.heldout-documents is 2"):
        load(data=DataConfig(num_shards=4, heldout_documents=2))
    with pytest.raises(UserError, match=r"--dataset \(documents\) is 41, but 40"):
        load(source=make_source("map", {"text": texts(41)}))
    with pytest.raises(UserError, match="--dataset"):
        load(source=make_source("files", {"text": texts(40)}))
    with pytest.raises(UserError, match="no cursor of shards"):
        load(state=halves[1])
    with pytest.raises(UserError, match="each shard once"):
        merge_states(halves[:1])
    with pytest.raises(UserError, match="each shard once"):
        merge_states([*halves, halves[0]])
    with pytest.raises(UserError, match="different runs"):
        merge_states([halves[0], {**halves[1], "seed": 3}])
