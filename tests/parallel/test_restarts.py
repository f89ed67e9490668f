"""Ranks of one attempt agree on a name, whatever those of earlier ones have left in the store."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from datetime import timedelta

import pytest
import torch.distributed as dist

from bigsae.parallel.restarts import agreed_name, may_restart

LIMIT = timedelta(seconds=20)


def attempt(store: dist.Store, delays: Sequence[float], limit: timedelta = LIMIT) -> list[str]:
    """The name that each rank finds, or what it raises, where rank r comes after `delays[r]` seconds."""
    found = [""] * len(delays)

    def come(rank: int) -> None:
        time.sleep(delays[rank])
        try:
            found[rank] = agreed_name(store, rank, len(delays), limit)
        except RuntimeError as error:
            found[rank] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(len(delays))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_each_attempt_has_a_name_of_its_own():
    store = dist.HashStore()
    names = [attempt(store, delays) for delays in ([0, 0, 0], [0.2, 0, 0.1], [0, 0.2, 0.1], [0])]
    assert all(len(set(found)) == 1 for found in names)
    assert len({found[0] for found in names}) == len(names)


def test_words_of_a_rank_that_was_killed_before_it_had_its_answer_do_no_harm():
    store = dist.HashStore()
    for rank in (1, 2):
        store.set(f"bigsae/here/{rank}", "of an attempt before")
    assert len(set(attempt(store, [0, 0.3, 0.2]))) == 1


def test_who_waits_for_a_rank_that_does_not_come_gives_up():
    store = dist.HashStore()
    (found,) = attempt(store, [0], LIMIT)
    assert found
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="Wait timeout"):
        agreed_name(store, 0, 2, timedelta(seconds=0.2))
    with pytest.raises(RuntimeError, match=r"[Tt]imeout"):
        agreed_name(store, 1, 2, timedelta(seconds=0.2))
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("agent", "restarts", "expected"),
    [("True", "3", True), ("True", "0", False), ("False", "3", False), (None, None, False)],
)
def test_only_where_a_launcher_may_start_them_again(monkeypatch, agent, restarts, expected):
    for name, value in (("USE_AGENT_STORE", agent), ("MAX_RESTARTS", restarts)):
        if value is None:
            monkeypatch.delenv(f"TORCHELASTIC_{name}", raising=False)
        else:
            monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    assert may_restart() == expected
