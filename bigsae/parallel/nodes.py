"""The nodes of a run: what one rank of each does before the others, and how long ranks wait for one another."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup

from bigsae.config import UserError
from bigsae.parallel import collectives
from bigsae.parallel.mesh import Mesh

# How long those that are left wait for one another's names.
_SECONDS_TO_SIGN = 6.0


class PeerLost(RuntimeError):
    """Another rank of the run died, failed, or did not answer in time."""


def local_rank() -> int:
    """This rank's number on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def first_on_node(mesh: Mesh) -> Iterator[None]:
    """A block that the first rank of each node runs before the node's other ranks, which then find its files there.

    All ranks come here, and none talks to another within the block. What the block raises on any rank ends all of
    them: that rank with its own error, the others with the same UserError, or with PeerLost where it was no UserError.
    """
    goes_first = local_rank() == 0
    own: Exception | None = None
    for turn in (True, False):
        if goes_first is turn:
            try:
                yield
            except Exception as error:
                own = error
        _end_together(own, mesh)


def _end_together(own: Exception | None, mesh: Mesh) -> None:
    """Raise on every rank where one of them has an error: its own, or what the first that has one found."""
    described = None if own is None else (isinstance(own, UserError), str(own), type(own).__name__)
    found = collectives.objects(described, mesh.control)
    if own is not None:
        raise own
    for rank, error in enumerate(found):
        if error is not None:
            by_user, text, kind = error
            raise (
                UserError(text)
                if by_user
                else PeerLost(f"rank {rank} of the run failed: {kind}: {_one_line(text)}")
            )


@contextmanager
def errors_shared(mesh: Mesh) -> Iterator[None]:
    """What one rank finds wrong with its part of the data all raise, so that rank 0 has it to print."""
    message = ""
    try:
        yield
    except UserError as error:
        message = str(error)
    if message := collectives.first_text(message, mesh.control):
        raise UserError(message)


def limit_new_groups(minutes: float) -> None:
    """Let no rank wait longer for another while they make a group, and in groups made from now on.

    Neither DeviceMesh nor FSDP can be told, and torch 2.13 takes nothing over from the launch's own group: it reads
    these two names for each new one, 30 and 10 minutes.
    """
    c10d = dist.distributed_c10d
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timedelta(minutes=minutes)


def limit_waits(groups: Iterable[ProcessGroup | None], minutes: float) -> None:
    """Let no rank wait longer for another in `groups`, which were made with another limit."""
    for group in groups:
        if group is not None:
            group.set_timeout(timedelta(minutes=minutes))


@contextmanager
def lost_peers_named(minutes: float) -> Iterator[None]:
    """Turn what torch raises where another rank is gone, or silent for `minutes`, into a PeerLost of one line."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, PeerLost) or not _is_of_a_peer(error):
            raise
        raise PeerLost(
            f"{_lost_ranks()} of the run died, or did not answer within --timeout {minutes:g} minutes "
            f"({_one_line(str(error))}); why stands in its own node's output. Start all nodes again with --resume to "
            "go on from the last checkpoint"
        ) from error


def _lost_ranks() -> str:
    """The ranks that do not sign a list in the store of the launch, in words; those that are left all come here."""
    found = ["another rank"]
    # A thread, as the store may have gone with its node, and then answers nobody for many minutes.
    thread = threading.Thread(target=_ask_for_signatures, args=(found,), daemon=True)
    thread.start()
    thread.join(2 * _SECONDS_TO_SIGN)
    return found[0]


def _ask_for_signatures(found: list[str]) -> None:
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=_SECONDS_TO_SIGN))
        store.set(f"bigsae/left/{dist.get_rank()}", "1")
        end = time.monotonic() + _SECONDS_TO_SIGN
        ranks = range(dist.get_world_size())
        while missing := [rank for rank in ranks if not store.check([f"bigsae/left/{rank}"])]:
            if time.monotonic() > end:
                found[0] = f"rank {', '.join(map(str, missing))}"
                return
            time.sleep(0.2)
    except (RuntimeError, ValueError):
        return  # the store is gone: nobody can be named


def _is_of_a_peer(error: BaseException) -> bool:
    # gloo's errors come as plain RuntimeErrors that begin with the place in its source, a FileStore's as these words.
    return (
        isinstance(error, dist.DistError)
        or "gloo/transport" in str(error)
        or "[gloo]" in str(error).lower()
        or str(error) == "Wait timeout"
    )


def _one_line(text: str, num_characters: int = 200) -> str:
    """Without the place in torch's source and the advice behind it."""
    text = " ".join(re.sub(r"^\[\S*:\d+\]", "", text).split(" This is typically")[0].split())
    return text if len(text) <= num_characters else text[: num_characters - 1] + "…"
