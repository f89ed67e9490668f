"""Where latents fire: a pass of the language model over the run's text, and the contexts chosen from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigsae.lm.activations import Extractor
from bigsae.reporting.options import ReportConfig
from bigsae.sae.base import SAE

_LATENTS_AT_ONCE = 2**25
_NUM_BINS = 40


@dataclass(frozen=True)
class Watched:
    """An SAE, and which of its latents are watched."""

    sae: SAE
    reads: str
    """Hookpoint of its inputs."""
    latents: list[int]


@torch.no_grad()
def watch(
    watched: Sequence[Watched],
    extract: Extractor,
    rows: Sequence[Tensor],
    kept: Callable[[Tensor], Tensor],
    show: Callable[[int], None],
) -> list[Tensor]:
    """Activations of each SAE's watched latents, float32 [rows, ctx_len, latents] on the CPU.

    `rows` are batches of token ids [n, ctx_len]; where `kept` of them is False, activations are left at 0. `show` is
    told how many rows are done.
    """
    found: list[list[Tensor]] = [[] for _ in watched]
    done = 0
    for ids in rows:
        mask = kept(ids)
        activations = extract(ids)
        for one, parts in zip(watched, found, strict=True):
            x = activations[one.reads]
            acts = torch.zeros(*ids.shape, len(one.latents))
            acts[mask] = _encode(one, x[mask.to(x.device)])
            parts.append(acts)
        done += len(ids)
        show(done)
    return [torch.cat(parts) for parts in found]


def _encode(one: Watched, x: Tensor) -> Tensor:
    """Activations [tokens, latents] of `x` [tokens, d_in], on the CPU."""
    device = one.sae.W_enc.device
    latents = torch.tensor(one.latents, device=device, dtype=torch.long)
    parts = x.split(max(1, _LATENTS_AT_ONCE // one.sae.d_sae))
    encoded = [one.sae.encode(part.to(device)).index_select(-1, latents).float().cpu() for part in parts]
    return torch.cat(encoded) if encoded else torch.zeros(0, len(one.latents))


def contexts(acts: Tensor, ids: Tensor, options: ReportConfig, text: Callable[[int], int]) -> dict[str, Any]:
    """What the report says of one latent from its `acts` [rows, ctx_len] over `ids` of the same shape.

    "top": the rows where it fires most; "rest": rows spread over all others where it fires, down to the weakest. Each
    is a window of `num_tokens` about the row's strongest token. `text` gives the place of a token's text in a table.
    """
    peaks, places = acts.max(dim=1)
    order = peaks.argsort(descending=True, stable=True)
    order = order[peaks[order] > 0]
    top, others = order[: options.num_contexts], order[options.num_contexts :]
    num_rest = max(options.num_contexts // 2, 1)
    steps = torch.linspace(0, len(others) - 1, min(num_rest, len(others))).round().long()
    firing = acts[acts > 0]

    def window(row: int) -> dict[str, Any]:
        return _window(acts[row], ids[row], int(places[row]), options.context_tokens, text)

    most = firing.max().item() if len(firing) else 0.0
    histogram = torch.histc(firing, _NUM_BINS, 0, most).int().tolist() if len(firing) else []
    return {
        "max": _short(most),
        "fires": len(firing),
        "hist": histogram,
        "top": [window(row) for row in top.tolist()],
        "rest": [window(row) for row in others[steps].tolist()],
    }


def _window(
    acts: Tensor, ids: Tensor, peak: int, num_tokens: int, text: Callable[[int], int]
) -> dict[str, Any]:
    """Two thirds of the window lie before the peak: what a latent responds to is what came before."""
    start = max(0, min(peak - num_tokens * 2 // 3, len(ids) - num_tokens))
    part = slice(start, start + num_tokens)
    return {
        "t": [text(token) for token in ids[part].tolist()],
        "a": [_short(value) for value in acts[part].tolist()],
        "p": peak - start,
    }


def _short(value: float) -> float:
    return float(f"{value:.3g}")
