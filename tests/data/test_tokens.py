"""Rows of tokens: packing, ranks, epochs, the thread."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigsae.config import DataConfig, UserError
from bigsae.data import packing, sources, tokens
from bigsae.data.packing import Cursor, Row, produce
from bigsae.data.tokenizer import encoder, layout_for
from bigsae.data.tokens import TokenRows, open_dataset, token_mask
from tests.data.corpora import KINDS, make_source, naive_rows, shard_contents, texts
from tests.models import english, tiny_tokenizer


def rows_of(source, tokenizer, ctx_len, data, seed=0, rank=0, num_ranks=1):
    return [row.tolist() for row in TokenRows(source, tokenizer, ctx_len, data, seed, rank, num_ranks)]


def rows_by_shard(source, tokenizer, ctx_len, data, shards, seed=0):
    layout = layout_for(tokenizer, ctx_len, source.pretokenised)
    by_shard: dict[int, list[list[int]]] = {v: [] for v in shards}
    cursors = [Cursor(v) for v in shards]
    for item in produce(source, encoder(tokenizer, layout), layout, data, seed, cursors):
        if isinstance(item, Row):
            by_shard[item.cursor.shard].append(item.tokens.tolist())
    return by_shard


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("special", ["bos eos", "eos", "bos", ""])
def test_packing_token_by_token(kind, special, tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)  # its own, for it is altered
    if "bos" not in special:
        tokenizer.bos_token = None
    if "eos" not in special:
        tokenizer.eos_token = None
    data = DataConfig(num_shards=3, epochs=2)
    source = make_source(kind, {"text": texts(50)})
    orders = [shard_contents(source, data, 0, epoch) for epoch in (0, 1)]
    found = rows_by_shard(source, tokenizer, 19, data, range(3))
    for v in range(3):
        expected, _ = naive_rows(orders[0][v] + orders[1][v], tokenizer, 19)
        assert len(expected) > 5
        assert found[v] == expected


def test_rows_are_int64_of_ctx_len_and_begin_with_bos(tokenizer):
    data = DataConfig(epochs=1, num_shards=2)
    rows = TokenRows(make_source("map", {"text": texts(30)}), tokenizer, 16, data, 0, 0, 1)
    first = next(rows)
    assert first.dtype == torch.int64
    assert first.shape == (16,)
    assert first[0] == tokenizer.bos_token_id
    assert rows.layout.dtype(0).itemsize == 2
    rows.close()


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_take_disjoint_documents_and_together_all(kind, monkeypatch):
    monkeypatch.setattr(sources, "WINDOW_DOCUMENTS", 64)
    monkeypatch.setattr(sources, "FETCH_DOCUMENTS", 7)
    num_documents = 333
    source = make_source(kind, {"input_ids": [[i, i, i, i] for i in range(num_documents)]})
    data = DataConfig(num_shards=4, epochs=1)
    for num_ranks in (1, 2, 3):
        seen = Counter()
        for rank in range(num_ranks):
            rows = rows_of(source, None, 4, data, 0, rank, num_ranks)
            assert len(rows) > 30
            seen.update(row[0] for row in rows)
        assert seen == Counter(range(num_documents))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_reads_no_document_of_anothers(kind, tokenizer):
    documents = texts(40)
    data = DataConfig(num_shards=4, epochs=1)
    source = make_source(kind, {"text": documents})
    tokenised: list[set[str]] = []
    for rank in range(2):
        rows = TokenRows(source, tokenizer, 16, data, 0, rank, 2)
        encode, mine = rows._encode, set()
        rows._encode = lambda batch, encode=encode, mine=mine: (mine.update(batch), encode(batch))[1]
        list(rows)
        tokenised.append(mine)
    assert not tokenised[0] & tokenised[1]
    assert tokenised[0] | tokenised[1] == set(documents)


@pytest.mark.parametrize("kind", KINDS)
def test_another_epoch_or_seed_is_another_order_of_the_same_documents(kind):
    source = make_source(kind, {"text": texts(100)})
    data = DataConfig(num_shards=3)
    first = shard_contents(source, data, 0, 0)
    for seed, epoch in ((0, 1), (1, 0)):
        other = shard_contents(source, data, seed, epoch)
        assert {v: sorted(part) for v, part in other.items()} == {
            v: sorted(part) for v, part in first.items()
        }
        assert all(other[v] != first[v] for v in range(3))
    assert shard_contents(source, data, 0, 0) == first


@pytest.mark.parametrize("kind", KINDS)
def test_shards_advance_in_step_wherever_each_begins(kind, monkeypatch):
    monkeypatch.setattr(sources, "WINDOW_DOCUMENTS", 64)
    source = make_source(kind, {"text": [str(i) for i in range(1200)]})
    data = DataConfig(num_shards=3)
    whole = list(source.walk(data, 0, 0, {v: sources.Start(0) for v in range(3)}))
    places = [(document.position, document.shard) for document in whole]
    assert places == sorted(set(places))
    assert len(places) == 1200

    def begin(documents, firsts):
        return {
            v: next(
                sources.Start(d.position, d.anchor) for d in documents if (d.shard, d.position) == (v, first)
            )
            for v, first in firsts.items()
        }

    def check(documents, starts):
        """A walk from `starts` gives what `documents` hold; anchors may say the same in other words."""
        rest = list(source.walk(data, 0, 0, starts))
        expected = [
            document for document in documents if document.position >= starts[document.shard].position
        ]
        assert [document[:3] for document in rest] == [document[:3] for document in expected]
        return rest

    # A walk that began at an anchor gives anchors that are as good.
    once = check(whole, begin(whole, {0: 5, 1: 130, 2: 70}))
    twice = check(once, begin(once, {0: 101, 1: 131, 2: 200}))
    check(twice, begin(twice, {0: 101, 1: 238, 2: 219}))


def test_permuted_is_a_permutation_and_mixes():
    for size in (1, 2, 3, 5, 16, 17, 100, 1000):
        out = sources.permuted(np.arange(size), size, key=5)
        assert sorted(out.tolist()) == list(range(size))
    size = 2000
    # Uniform over keys: where 0 goes has the mean and the spread of a uniform draw, neighbours are not kept
    # together.
    places = np.array([sources.permuted(np.arange(2), size, key) for key in range(500)])
    assert abs(places[:, 0].mean() / size - 0.5) < 0.06
    assert abs(places[:, 0].std() / size - 12**-0.5) < 0.03
    assert abs(np.corrcoef(places.T)[0, 1]) < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_last_epoch_ends_and_tails_are_counted(kind, tokenizer, caplog):
    source = make_source(kind, {"text": [*texts(40), "", None, " \n\t"]})
    data = DataConfig(num_shards=4, epochs=1)
    order = shard_contents(source, data, 0, 0)
    expected = [naive_rows(order[v], tokenizer, 23) for v in range(4)]
    rows = TokenRows(source, tokenizer, 23, data, 0, 0, 1)
    with caplog.at_level(logging.INFO, "bigsae"):
        found = [row.tolist() for row in rows]
    assert sorted(found) == sorted(row for part, _ in expected for row in part)
    assert rows.num_dropped_tokens == sum(left for _, left in expected) > 0
    assert rows.num_skipped_documents == 3
    assert f"3 empty documents skipped and {rows.num_dropped_tokens} tokens dropped" in caplog.text
    assert next(rows, None) is None


def test_a_new_epoch_is_logged_and_never_ends(tokenizer, caplog):
    source = make_source("map", {"text": texts(10)})
    rows = TokenRows(source, tokenizer, 16, DataConfig(num_shards=2), 0, 0, 1)
    with caplog.at_level(logging.INFO, "bigsae"):
        for _ in range(100):
            next(rows)
    rows.close()
    assert "epoch 1 begins, in a new order" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_input_ids_are_cut_and_their_remainders_counted(kind, caplog):
    lengths = [0, 3, 7, 8, 9, 16, 20, 31, 5, 24]
    ids = [[100 * i + j for j in range(length)] for i, length in enumerate(lengths)]
    source = make_source(kind, {"input_ids": [*ids, None]})
    rows = TokenRows(source, None, 8, DataConfig(num_shards=2, epochs=1), 0, 0, 1)
    with caplog.at_level(logging.INFO, "bigsae"):
        found = [row.tolist() for row in rows]
    expected = [row[i : i + 8] for row in ids for i in range(0, len(row) - 7, 8)]
    assert sorted(found) == sorted(expected)
    assert rows.num_dropped_tokens == sum(length % 8 for length in lengths)
    assert rows.num_skipped_documents == 2
    assert f"{rows.num_dropped_tokens} tokens dropped" in caplog.text


def test_token_mask():
    rows = torch.tensor([[0, 5, 6, 1], [9, 1, 1, 5]])
    both = DataConfig()
    assert token_mask(rows, [0, 1], both).tolist() == [
        [False, True, True, False],
        [False, False, False, True],
    ]
    first = DataConfig(drop_special_tokens=False)
    assert token_mask(rows, [0, 1], first).tolist() == [[False, True, True, True]] * 2
    special = DataConfig(drop_first_position=False)
    assert token_mask(rows, [0, 1], special).tolist() == [
        [False, True, True, False],
        [True, False, False, True],
    ]
    neither = DataConfig(drop_first_position=False, drop_special_tokens=False)
    assert token_mask(rows, [], neither).all()


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=25),
    ctx_len=st.integers(2, 40),
    num_shards=st.integers(1, 6),
    ranks=st.integers(1, 4),
    kind=st.sampled_from(KINDS),
    epochs=st.integers(1, 2),
)
def test_every_token_is_packed_once(tokenizer, lengths, ctx_len, num_shards, ranks, kind, epochs):
    words = texts(len(lengths))
    documents = [" ".join(text.split()[:length]) for text, length in zip(words, lengths, strict=True)]
    num_ranks = min(ranks, num_shards)
    data = DataConfig(num_shards=num_shards, epochs=epochs)
    source = make_source(kind, {"text": documents}, num_files=6)
    orders = [shard_contents(source, data, 0, epoch) for epoch in range(epochs)]
    shards = [
        naive_rows(list(chain.from_iterable(order[v] for order in orders)), tokenizer, ctx_len)
        for v in range(num_shards)
    ]
    for rank in range(num_ranks):
        mine = shards[rank::num_ranks]
        expected = Counter(tuple(row) for rows, _ in mine for row in rows)
        try:
            rows = TokenRows(source, tokenizer, ctx_len, data, 0, rank, num_ranks)
            found = Counter(tuple(row.tolist()) for row in rows)
        except UserError:
            first = [naive_rows(orders[0][v], tokenizer, ctx_len) for v in range(rank, num_shards, num_ranks)]
            num_tokens = sum(len(part) * (ctx_len - 1) + left for part, left in first)
            assert num_tokens < ctx_len - 1 or not expected or len(documents) < num_ranks
        else:
            assert found == expected
            assert rows.num_dropped_tokens == sum(left for _, left in mine)


def test_a_huge_document_takes_linear_time_and_is_cut_where_tokens_end(tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "PIECE_CHARACTERS", 1 << 13)
    data = DataConfig(num_shards=1, epochs=1)
    seconds = []
    for num_words in (20_000, 160_000):
        text = " ".join(texts(1)[0].split() * (num_words // 4))[: num_words * 5]
        source = make_source("map", {"text": [text]})
        start = time.perf_counter()
        found = rows_of(source, tokenizer, 64, data)
        seconds.append(time.perf_counter() - start)
        if num_words == 20_000:
            assert found == naive_rows([text], tokenizer, 64)[0]
    assert seconds[1] < 8 * 3 * seconds[0]


def test_a_document_without_any_gap_is_cut_as_well(tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "PIECE_CHARACTERS", 100)
    text = "".join(chr(97 + i % 26) for i in range(1050))
    pieces = list(packing.Packer(Cursor(0), layout_for(tokenizer, 8, False), "x")._cut_text(text))
    assert "".join(piece for piece, _ in pieces) == text
    assert [is_last for _, is_last in pieces] == [False] * 10 + [True]


def test_long_documents_do_not_warn(tmp_path, caplog, recwarn):
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.model_max_length = 10
    rows_of(make_source("map", {"text": texts(20)}), tokenizer, 16, DataConfig(num_shards=1, epochs=1))
    assert "longer than" not in caplog.text
    assert not [w for w in recwarn if "longer" in str(w.message)]


def test_an_error_in_the_thread_reaches_the_consumer_and_the_next_call_goes_on(tokenizer):
    source = make_source("map", {"text": texts(200)})
    data = DataConfig(num_shards=2, epochs=1)
    expected = rows_of(source, tokenizer, 16, data)
    rows = TokenRows(source, tokenizer, 16, data, 0, 0, 1)
    encode, calls = rows._encode, []

    def fail_at_the_second(batch):
        calls.append(len(batch))
        if len(calls) == 2:
            raise RuntimeError("connection lost")
        return encode(batch)

    rows._encode = fail_at_the_second
    found = []
    with pytest.raises(RuntimeError, match="connection lost"):
        found.extend(iter(lambda: next(rows).tolist(), None))
    assert found
    assert found + [row.tolist() for row in rows] == expected


def test_close_ends_the_thread_and_rows_go_on_after_it(tokenizer):
    source = make_source("map", {"text": texts(100)})
    expected = rows_of(source, tokenizer, 16, DataConfig(num_shards=2, epochs=1))
    rows = TokenRows(source, tokenizer, 16, DataConfig(num_shards=2, epochs=1), 0, 0, 1)
    found = [next(rows).tolist() for _ in range(3)]
    rows.close()
    rows.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "bigsae-tokens"]
    assert found + [row.tolist() for row in rows] == expected


def test_the_thread_ends_with_its_owner(tokenizer):
    rows = TokenRows(
        make_source("map", {"text": texts(100)}), tokenizer, 16, DataConfig(num_shards=2), 0, 0, 1
    )
    next(rows)
    assert [thread for thread in threading.enumerate() if thread.name == "bigsae-tokens"]
    del rows
    assert not [thread for thread in threading.enumerate() if thread.name == "bigsae-tokens"]


def test_the_interpreter_ends_while_the_thread_runs(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "from pathlib import Path\n"
        "from bigsae.config import DataConfig\n"
        "from bigsae.data.tokens import TokenRows\n"
        "from tests.data.corpora import make_source, texts\n"
        "from tests.models import english, tiny_tokenizer\n"
        f"tokenizer = tiny_tokenizer(Path({str(tmp_path)!r}))\n"
        "rows = TokenRows(make_source('map', {'text': texts(50)}), tokenizer, 16, DataConfig(num_shards=2), 0, 0, 1)\n"
        "print(len(next(rows)))\n"
    )
    code = f"import sys; sys.path.insert(0, '.'); exec(open({str(script)!r}).read())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "16"
    assert "Traceback" not in done.stderr


def test_the_queue_is_bounded(tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "_PREFETCH_ROWS", 5)
    rows = TokenRows(
        make_source("map", {"text": texts(20)}), tokenizer, 16, DataConfig(num_shards=2), 0, 0, 1
    )
    next(rows)
    deadline = time.monotonic() + 10
    while not rows._queue.full() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert rows._queue.qsize() == 5
    rows.close()


def test_long_documents_take_turns(tmp_path, tokenizer):
    """A row of each shard's document in turn: no stretch of rows comes from one document alone."""
    corpus = tmp_path / "long.jsonl"
    corpus.write_text("".join(json.dumps({"text": english(2000, seed=i)}) + "\n" for i in range(4)))
    data = DataConfig(num_shards=4, epochs=1)
    rows = TokenRows(open_dataset(str(corpus), data), tokenizer, 32, data, seed=0, rank=0, num_ranks=1)
    shards = []
    before = {cursor["shard"]: cursor for cursor in rows.state_dict()["cursors"]}
    for _ in range(40):
        next(rows)
        after = {cursor["shard"]: cursor for cursor in rows.state_dict()["cursors"]}
        shards += [shard for shard in after if after[shard] != before[shard]]
        before = after
    rows.close()
    assert shards == [0, 1, 2, 3] * 10
