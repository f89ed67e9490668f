"""The activations that wait on a rank: preallocated, each leaves once, in a seeded random order.

Only the *list* of waiting activations has a meaning (those not yet read, in reading order, then those written since
the last shuffle); where in memory each one lies has none. So a checkpoint keeps the list, and a resumed run reads the
same activations in the same order.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from bigsae.parallel.allocating import enough_memory
from bigsae.seeds import derive_seed

logger = logging.getLogger("bigsae")

_COPY_ROWS = 16_384


class ActivationBuffer:
    """Room for `capacity` + `headroom` activations of each hookpoint; `widths` gives their d_in.

    All hookpoints share one order: activation i of each comes from the same token.
    """

    def __init__(
        self,
        widths: dict[str, int],
        capacity: int,
        headroom: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        rank: int,
    ):
        self.capacity, self.headroom = capacity, headroom
        slots = capacity + headroom
        self._device = device
        self._pinned = device.type == "cpu" and torch.cuda.is_available()
        with enough_memory(
            f"--buffer.tokens {capacity} and {headroom} of --lm.micro-batch-rows at {len(widths)} hookpoints",
            "lower --buffer.tokens or --lm.micro-batch-rows",
        ):
            self.storage = {
                name: torch.empty(slots, d_in, dtype=dtype, device=device, pin_memory=self._pinned)
                for name, d_in in widths.items()
            }
        self._generator = torch.Generator().manual_seed(derive_seed(seed, "buffer", rank))
        self._unread = torch.empty(0, dtype=torch.int64)  # slots, in reading order
        self._order = self._unread.to(device)  # the same, where the storage is
        self._new: list[Tensor] = []  # slots written since the last shuffle, in order
        self._free = torch.arange(slots)

    @property
    def num_unread(self) -> int:
        """Activations that can be read."""
        return len(self._unread)

    @property
    def num_waiting(self) -> int:
        """Activations that can be read now or after the next `shuffle`."""
        return len(self._unread) + sum(map(len, self._new))

    def num_bytes(self) -> int:
        """Size of the storage."""
        return sum(t.numel() * t.element_size() for t in self.storage.values())

    def bytes_each(self) -> int:
        """Size of one activation of every hookpoint."""
        return sum(s.shape[1] * s.element_size() for s in self.storage.values())

    def write(self, activations: dict[str, Tensor]) -> None:
        """Take in `[n, d_in]` activations of each hookpoint, n at most `headroom`; read after the next `shuffle`."""
        num_new = len(next(iter(activations.values())))
        assert num_new <= len(self._free)
        slots, self._free = self._free[:num_new], self._free[num_new:]
        for name, values in activations.items():
            storage = self.storage[name]
            storage[slots.to(storage.device)] = values.to(storage.device, storage.dtype)
        self._new.append(slots)

    def shuffle(self) -> None:
        """Put all waiting activations into a new random order."""
        waiting = torch.cat([self._unread, *self._new])
        self._set_unread(waiting[torch.randperm(len(waiting), generator=self._generator)])
        self._new = []

    def _set_unread(self, slots: Tensor) -> None:
        # To the device once a refill, and not with each batch: that would be a synchronisation in each step.
        self._unread, self._order = slots, slots.to(self._device)

    def peek(self, num_tokens: int) -> dict[str, Tensor]:
        """The next `num_tokens` activations `[num_tokens, d_in]` of each hookpoint; they stay unread."""
        assert num_tokens <= self.num_unread
        slots = self._order[:num_tokens]
        batch = {name: storage[slots] for name, storage in self.storage.items()}
        # Pinned, a batch can travel to the accelerator while that is at work.
        return {name: x.pin_memory() for name, x in batch.items()} if self._pinned else batch

    def read(self, num_tokens: int) -> dict[str, Tensor]:
        """The next `num_tokens` activations `[num_tokens, d_in]` of each hookpoint; they leave the buffer."""
        batch = self.peek(num_tokens)
        self._free = torch.cat([self._free, self._unread[:num_tokens]])
        self._unread, self._order = self._unread[num_tokens:], self._order[num_tokens:]
        return batch

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: all waiting activations, in the order of the list, on the CPU."""
        waiting = torch.cat([self._unread, *self._new])
        kept = self._empty(len(waiting))
        for name, storage in self.storage.items():
            # In parts: a copy of the whole on the accelerator might not fit there.
            for part, slots in zip(kept[name].split(_COPY_ROWS), waiting.split(_COPY_ROWS), strict=True):
                part.copy_(storage[slots.to(storage.device)])
        return kept | {"generator": self._generator.get_state()}

    def counters(self) -> dict[str, int]:
        """Lengths of the two parts of the list that `tensors` holds."""
        return {"num_unread": self.num_unread, "num_new": self.num_waiting - self.num_unread}

    def empty_tensors(self, counters: dict[str, int]) -> dict[str, Tensor]:
        """Tensors of the shapes of a checkpoint with these `counters`, to read it into."""
        empty = self._empty(counters["num_unread"] + counters["num_new"])
        return empty | {"generator": torch.empty_like(self._generator.get_state())}

    def _empty(self, num_tokens: int) -> dict[str, Tensor]:
        return {name: s.new_empty(num_tokens, s.shape[1], device="cpu") for name, s in self.storage.items()}

    def load(self, tensors: dict[str, Tensor], counters: dict[str, int]) -> None:
        """Take back what `tensors` and `counters` gave; of other ranks' buffers together, without "generator"."""
        num_unread, num_waiting = counters["num_unread"], counters["num_unread"] + counters["num_new"]
        self._make_room(num_waiting)
        slots = torch.arange(len(next(iter(self.storage.values()))))
        for name, storage in self.storage.items():
            storage[:num_waiting] = tensors[name].to(storage.device)
        self._set_unread(slots[:num_unread])
        self._free = slots[num_waiting:]
        self._new = [slots[num_unread:num_waiting]]
        if "generator" in tensors:
            self._generator.set_state(tensors["generator"])

    def _make_room(self, num_waiting: int) -> None:
        """Grow where fewer ranks than before hold what waited: none of it may be lost."""
        slots = num_waiting + self.headroom
        if slots <= self.capacity + self.headroom:
            return
        logger.warning(
            "the buffer of a rank grows from %d to %d activations, to hold those of more ranks",
            self.capacity,
            num_waiting,
        )
        for name, storage in self.storage.items():
            self.storage[name] = torch.empty(
                slots, storage.shape[1], dtype=storage.dtype, device=storage.device, pin_memory=self._pinned
            )
