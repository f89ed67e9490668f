"""The activations that wait on a rank: preallocated, each leaves once, in a seeded random order.

Only the *list* of waiting activations has a meaning (those not yet read, in reading order, then those written since
the last shuffle); where in memory each one lies has none. So a checkpoint keeps the list, and a resumed run reads the
same activations in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigsae.seeds import derive_seed


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
        # Pinned, so that a batch travels to the accelerator without a copy in between.
        pin = device.type == "cpu" and torch.cuda.is_available()
        self.storage = {
            name: torch.empty(slots, d_in, dtype=dtype, device=device, pin_memory=pin)
            for name, d_in in widths.items()
        }
        self._generator = torch.Generator().manual_seed(derive_seed(seed, "buffer", rank))
        self._unread = torch.empty(0, dtype=torch.int64)  # slots, in reading order
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

    @property
    def has_room(self) -> bool:
        """Whether one more `write` of up to `headroom` activations fits."""
        return len(self._free) >= self.headroom

    def num_bytes(self) -> int:
        """Size of the storage."""
        return sum(t.numel() * t.element_size() for t in self.storage.values())

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
        self._unread = waiting[torch.randperm(len(waiting), generator=self._generator)]
        self._new = []

    def peek(self, num_tokens: int) -> dict[str, Tensor]:
        """The next `num_tokens` activations `[num_tokens, d_in]` of each hookpoint; they stay unread."""
        assert num_tokens <= self.num_unread
        slots = self._unread[:num_tokens]
        return {name: storage[slots.to(storage.device)] for name, storage in self.storage.items()}

    def read(self, num_tokens: int) -> dict[str, Tensor]:
        """The next `num_tokens` activations `[num_tokens, d_in]` of each hookpoint; they leave the buffer."""
        batch = self.peek(num_tokens)
        self._free = torch.cat([self._free, self._unread[:num_tokens]])
        self._unread = self._unread[num_tokens:]
        return batch

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: all waiting activations, in the order of the list, on the CPU."""
        waiting = torch.cat([self._unread, *self._new])
        kept = {name: storage[waiting.to(storage.device)].cpu() for name, storage in self.storage.items()}
        return kept | {"generator": self._generator.get_state()}

    def counters(self) -> dict[str, int]:
        """Lengths of the two parts of the list that `tensors` holds."""
        return {"num_unread": self.num_unread, "num_new": self.num_waiting - self.num_unread}

    def empty_tensors(self, counters: dict[str, int]) -> dict[str, Tensor]:
        """Tensors of the shapes of a checkpoint with these `counters`, to read it into."""
        num_waiting = counters["num_unread"] + counters["num_new"]
        empty = {
            name: storage.new_empty(num_waiting, storage.shape[1], device="cpu")
            for name, storage in self.storage.items()
        }
        return empty | {"generator": torch.empty_like(self._generator.get_state())}

    def load(self, tensors: dict[str, Tensor], counters: dict[str, int]) -> None:
        """Take back what `tensors` and `counters` gave."""
        num_unread, num_waiting = counters["num_unread"], counters["num_unread"] + counters["num_new"]
        slots = torch.arange(self.capacity + self.headroom)
        for name, storage in self.storage.items():
            storage[:num_waiting] = tensors[name].to(storage.device)
        self._unread, self._free = slots[:num_unread], slots[num_waiting:]
        self._new = [slots[num_unread:num_waiting]]
        self._generator.set_state(tensors["generator"])
