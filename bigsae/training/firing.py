"""Which latents fire, over all ranks: the dead mask, and the firing frequencies that are exported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from bigsae.parallel import collectives

_STEPS_OF_DOUBT = 32


class FiringStatistics:
    """Firing of each of the `d_own` latents that this rank holds.

    A latent fires on a token if it is selected there with a value > 0.

    A latent is dead when it has not fired for `dead_after_tokens` tokens of all ranks together. The frequencies are
    those of the last whole window of as many tokens, or of the present one while there is no whole one yet.
    """

    def __init__(
        self,
        d_own: int,
        dead_after_tokens: int,
        device: torch.device,
        group: ProcessGroup | None,
        latents: ProcessGroup | None = None,
    ):
        """`group`: the ranks that hold the same latents; `latents`: those that hold the others of the SAE."""
        self.dead_after_tokens = dead_after_tokens
        self.group, self.latents = group, latents
        self.num_tokens_since_fired = torch.zeros(d_own, dtype=torch.int64, device=device)
        self.window_counts = torch.zeros(d_own, dtype=torch.int64, device=device)
        self.last_window_counts = torch.zeros(d_own, dtype=torch.int64, device=device)
        self.num_window_tokens = 0
        self.num_last_window_tokens = 0
        self.num_tokens = 0
        self._doubt, self._ask_again_at = False, 0

    def update(self, counts: Tensor, num_tokens: int) -> Tensor:
        """Take in one step: `counts` [d_own] of this rank's tokens, `num_tokens` of all ranks together.

        Returns the counts of all ranks' tokens.
        """
        counts = collectives.sum_(counts.to(torch.int64), self.group)
        self.num_tokens_since_fired += num_tokens
        self.num_tokens_since_fired.masked_fill_(counts > 0, 0)
        if self.num_window_tokens >= self.dead_after_tokens:
            self.last_window_counts, self.num_last_window_tokens = self.window_counts, self.num_window_tokens
            self.window_counts, self.num_window_tokens = torch.zeros_like(counts), 0
        self.window_counts += counts
        self.num_window_tokens += num_tokens
        self.num_tokens += num_tokens
        return counts

    def revive(self, mask: Tensor) -> None:
        """Take the latents where `mask` [d_own] is True to have fired just now."""
        self.num_tokens_since_fired.masked_fill_(mask, 0)

    def may_be_dead(self, batch_tokens: int) -> bool:
        """Whether a latent may be dead in the coming step of `batch_tokens`; False is certain.

        The device is asked how long the most silent latent has been silent, and not again until that one could be dead:
        a question each step would be a host synchronisation each step. True lasts _STEPS_OF_DOUBT; if no latent is
        dead then, AuxK has weight 0 and the result is the same.
        """
        if self.num_tokens >= self._ask_again_at:
            # Of all ranks: what follows from a dead latent they do together.
            longest = int(collectives.max_(self.num_tokens_since_fired.max(), self.latents))
            num_steps = (self.dead_after_tokens - longest) // batch_tokens
            self._doubt = num_steps < _STEPS_OF_DOUBT
            self._ask_again_at = self.num_tokens + batch_tokens * max(num_steps, _STEPS_OF_DOUBT)
        return self._doubt

    def dead_mask(self) -> Tensor:
        """Bool `[d_own]`, the same on ranks that hold the same latents."""
        return self.num_tokens_since_fired >= self.dead_after_tokens

    def dead_fraction(self) -> float:
        """Share of all latents that are dead."""
        dead = self.dead_mask()
        sums = torch.stack([dead.sum(), torch.tensor(len(dead), device=dead.device)])
        num_dead, num_latents = collectives.sum_(sums, self.latents).tolist()
        return num_dead / num_latents

    def frequencies(self) -> Tensor:
        """Share of tokens on which each latent fires, float32 `[d_own]`."""
        whole = self.num_last_window_tokens > 0
        counts = self.last_window_counts if whole else self.window_counts
        num_tokens = self.num_last_window_tokens if whole else self.num_window_tokens
        return (counts.double() / max(num_tokens, 1)).float()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, apart from `counters`."""
        return {
            "num_tokens_since_fired": self.num_tokens_since_fired,
            "window_counts": self.window_counts,
            "last_window_counts": self.last_window_counts,
        }

    def counters(self) -> dict[str, int]:
        """The host's counts that a checkpoint keeps."""
        return {
            "num_window_tokens": self.num_window_tokens,
            "num_last_window_tokens": self.num_last_window_tokens,
            "num_tokens": self.num_tokens,
        }

    def load_counters(self, counters: dict[str, Any]) -> None:
        """Take back what `counters` gave."""
        self.num_window_tokens = counters["num_window_tokens"]
        self.num_last_window_tokens = counters["num_last_window_tokens"]
        self.num_tokens = counters["num_tokens"]
        self._ask_again_at = 0
