"""From token rows to batches of activations: refills the buffer, on all ranks together."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from bigsae.config import UserError
from bigsae.data.buffer import ActivationBuffer
from bigsae.parallel import collectives
from bigsae.parallel.mesh import Mesh

Extract = Callable[[Tensor], dict[str, Tensor]]
"""Token ids [rows, ctx_len] to activations [rows, ctx_len, d_in] of each hookpoint; the same calls on every rank."""


# After so many rows without a token to train on none is expected any more.
_ROWS_IN_VAIN = 4096
# Where no rank has rows, as when a stream's server is away, they ask one another so often whether to stop.
_PATIENCE_SECONDS = 1.0


class Rows(Protocol):
    """Rows [ctx_len] int64 that may be long in coming."""

    def __iter__(self) -> Iterator[Tensor]: ...
    def __next__(self) -> Tensor: ...
    def wait(self, num_rows: int, seconds: float) -> bool:
        """Wait for `seconds` at most; False where to ask for `num_rows` rows might take longer."""
        ...


class Harvest:
    """Batches of shuffled activations, the same number on every rank.

    A sharded LM needs all ranks for each forward, but ranks gather at different paces: special tokens are left out,
    and a rank's data may end. So ranks refill together, each time with the same number of forwards: a rank that is
    full, or has no rows left, runs an empty row and throws the outputs away. Its own rows wait, none is lost.
    """

    def __init__(
        self,
        rows: Iterator[Tensor],
        extract: Extract,
        trained_on: Callable[[Tensor], Tensor],
        buffer: ActivationBuffer,
        micro_batch_rows: int,
        ctx_len: int,
        batch_tokens: int,
        mesh: Mesh,
        wait_for_rows: Callable[[int, float], bool] = lambda num_rows, seconds: True,
    ):
        """`wait_for_rows(n, s)` waits for s seconds at most; False: `rows` might keep who asks for n waiting longer."""
        self.wait_for_rows = wait_for_rows
        self.rows, self.extract, self.trained_on = rows, extract, trained_on
        self.buffer, self.mesh = buffer, mesh
        self.micro_batch_rows, self.ctx_len, self.batch_tokens = micro_batch_rows, ctx_len, batch_tokens
        self.seconds = 0.0
        """Wall-clock time spent here, waiting for other ranks included."""
        self.num_tokens = 0
        """Tokens of this rank's rows that went through the language model, those that are left out with them."""
        self.refilling = True
        self._least_unread = 0  # of all ranks
        self._exhausted = False
        self._rows_in_vain = 0

    def fill(self, step: int, should_stop: Callable[[], bool]) -> bool:
        """Make sure that every rank can `read` a batch; refill where one rank's buffer is half used.

        Returns False where no further batch can be had: `should_stop` said so on some rank, or some rank's data has
        ended. Raises UserError, naming the hookpoint and `step`, where activations are not finite.
        """
        if not self.refilling and self._least_unread >= max(self.buffer.capacity // 2, self.batch_tokens):
            return True
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize(
                self.mesh.device
            )  # else the time of the steps before would count as this one's
        start = time.perf_counter()
        self.refilling = True
        finite = torch.ones(len(self.buffer.storage), dtype=torch.bool, device=self.mesh.device)
        stopped = self._gather(finite, should_stop)
        self._refuse_non_finite(finite, step)
        if not stopped:
            self.buffer.shuffle()
            self.refilling = False
            self._least_unread = collectives.min_int(self.buffer.num_unread, self.mesh.control)
        self.seconds += time.perf_counter() - start
        return not stopped and self._least_unread >= self.batch_tokens

    def read(self) -> dict[str, Tensor]:
        """This rank's part of the next batch: `[batch_tokens, d_in]` of each hookpoint."""
        self._least_unread -= self.batch_tokens
        return self.buffer.read(self.batch_tokens)

    def load(self, tensors: dict[str, Tensor], counters: dict[str, int], refilling: bool) -> None:
        """Go on from a checkpoint's buffer; `refilling` says that it was stopped within a refill."""
        self.buffer.load(tensors, counters)
        self.refilling = refilling
        self._least_unread = collectives.min_int(self.buffer.num_unread, self.mesh.control)

    def refill_from(self, parts: list[dict[str, Tensor]]) -> None:
        """Go on with waiting activations of other ranks' buffers: they are read after a refill, in a new order."""
        empty = {name: s.new_empty(0, s.shape[1], device="cpu") for name, s in self.buffer.storage.items()}
        whole = {name: torch.cat([empty[name], *(part[name] for part in parts)]) for name in empty}
        self.load(whole, {"num_unread": 0, "num_new": len(next(iter(whole.values())))}, refilling=True)

    def _gather(self, finite: Tensor, should_stop: Callable[[], bool]) -> bool:
        """Forwards until every rank's buffer is full or its data has ended. Returns whether it was stopped before.

        What one rank finds wrong with its own data all raise, so that the first of them has it to print.
        """
        message = ""
        while True:
            wants = not self._exhausted and self.buffer.num_waiting < self.buffer.capacity
            has = wants and self.wait_for_rows(self.micro_batch_rows, _PATIENCE_SECONDS)
            any_wants, any_has, stop, wrong = collectives.max_ints(
                [wants, has, should_stop(), bool(message)], self.mesh.control
            )
            if wrong:
                raise UserError(collectives.first_text(message, self.mesh.control))
            if stop or not any_wants:
                return bool(stop)
            if not any_has:
                continue
            chosen = None
            try:
                chosen = self._next_rows() if has else None
                if chosen is not None:
                    self._harvest(*chosen, finite)
            except UserError as error:
                message = str(error)
            if chosen is None:
                self.extract(torch.zeros(1, self.ctx_len, dtype=torch.int64))

    def _next_rows(self) -> tuple[Tensor, Tensor] | None:
        """Rows [rows, ctx_len], and which of their activations, counted through, are trained on; None: no more."""
        rows = list(itertools.islice(self.rows, self.micro_batch_rows))
        self._exhausted = len(rows) < self.micro_batch_rows
        if not rows:
            return None
        stacked = torch.stack(rows)
        keep = self.trained_on(stacked).flatten().nonzero().squeeze(1)
        self._rows_in_vain = 0 if len(keep) else self._rows_in_vain + len(rows)
        if self._rows_in_vain >= _ROWS_IN_VAIN:
            raise UserError(
                f"{self._rows_in_vain} rows in a row hold special tokens alone: look at --dataset, or keep them with "
                "--data.no-drop-special-tokens"
            )
        return stacked, keep

    def _harvest(self, rows: Tensor, keep: Tensor, finite: Tensor) -> None:
        """Run the LM on `rows` [rows, ctx_len]; what `keep` counts goes into the buffer. Notes what is not finite."""
        kept = {}
        for i, (name, values) in enumerate(self.extract(rows).items()):
            kept[name] = values.flatten(0, 1)[keep.to(values.device)]
            finite[i] &= torch.isfinite(kept[name]).all()
        self.buffer.write(kept)
        self.num_tokens += rows.numel()

    def _refuse_non_finite(self, finite: Tensor, step: int) -> None:
        broken = collectives.max_ints([int(not ok) for ok in finite.tolist()], self.mesh.control)
        for name, is_broken in zip(self.buffer.storage, broken, strict=True):
            if is_broken:
                raise UserError(
                    f"non-finite activations at {name} before step {step}: the model overflows in this data type "
                    "(try --lm.dtype bfloat16 or float32) or its weights are broken"
                )
