"""Where ranks meet that a launcher has started again.

The store of torchrun's agent outlives its workers, and torch 2.13 looks for it where it was: what ranks of the attempt
before have left there, their addresses among it, would be taken for those of this one, which then never meets. How
often a node's workers were started is no name for an attempt either: each agent counts for itself.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

INIT_METHOD = "bigsae://"
_SECONDS_BETWEEN_LOOKS = 0.02


def may_restart() -> bool:
    """Whether a launcher may start these ranks several times with one store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get(
        "TORCHELASTIC_MAX_RESTARTS", "0"
    ) not in ("", "0")


def agreed_name(store: dist.Store, rank: int, num_ranks: int, timeout: timedelta) -> str:
    """A name, the same on all ranks of this attempt and on none of another; all of them call this.

    Each rank but the first leaves a word of its own that no attempt had, and takes the name that comes in answer to
    this very word. The first answers all words that it finds, those of ranks that are gone too, until each rank has
    the name. Raises RuntimeError where they do not come within `timeout`.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"bigsae/here/{rank}", own)
        store.wait([f"bigsae/answer/{own}"], timeout)
        name = store.get(f"bigsae/answer/{own}").decode()
        store.set(f"bigsae/agreed/{name}/{rank}", "1")
        return name
    missing, answered = set(range(1, num_ranks)), set()
    end = time.monotonic() + timeout.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"bigsae/agreed/{own}/{other}"]):
                missing.remove(other)
            elif store.check([f"bigsae/here/{other}"]):
                word = store.get(f"bigsae/here/{other}").decode()
                if word not in answered:
                    store.set(f"bigsae/answer/{word}", own)
                    answered.add(word)
        if time.monotonic() > end:
            raise RuntimeError("Wait timeout")  # torch's own words for it
        if missing:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    return own


def _rendezvous(
    url: str, timeout: timedelta = timedelta(minutes=30), **_: object
) -> Iterator[tuple[dist.Store, int, int]]:
    """As torch's env://, in a part of the agent's store that is this attempt's."""
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), num_ranks, is_master=False, timeout=timeout
    )
    name = agreed_name(store, rank, num_ranks, timeout)
    yield dist.PrefixStore(f"bigsae/{name}", store), rank, num_ranks


dist.register_rendezvous_handler("bigsae", _rendezvous)
