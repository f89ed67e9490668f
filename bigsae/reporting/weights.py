"""What the weights of an SAE say by themselves: firing frequencies, norms, and how alike its latents are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigsae.config import UserError
from bigsae.hub.weights import read_safetensors
from bigsae.sae.base import SAE
from bigsae.seeds import derive_seed

# Cosines that exist at a time.
_SLAB_ELEMENTS = 2**25
_MOST_QUERIES = 16_384
NEVER = -9.5
"""Below this log10 of the share of tokens a latent never fired; sparsity.safetensors has -10 there."""
_DECADES = (-7.0, 0.0, 35)


@dataclass(frozen=True)
class Distributions:
    """One value a latent, [d_sae] each but `nearest`."""

    log_density: Tensor | None
    """log10 of the share of tokens on which it fires, below -9.5 where it never does. None where nothing tells."""
    decoder_norm: Tensor
    nearest: Tensor
    """Cosine of its decoder row with the one most like it, of as many random latents as could be looked at."""
    encoder_cosine: Tensor | None
    """Cosine of its encoder and its decoder row; None where these are in different spaces."""


@torch.no_grad()
def distributions(sae: SAE, folder: Path, seed: int) -> Distributions:
    """The distributions of the SAE that lies in `folder`. Its latents are never compared all with all at once."""
    queries = torch.arange(sae.d_sae)
    if sae.d_sae > _MOST_QUERIES:
        generator = torch.Generator().manual_seed(derive_seed(seed, "nearest", sae.d_sae))
        queries = torch.randperm(sae.d_sae, generator=generator)[:_MOST_QUERIES]
    same_space = not sae.is_transcoder
    return Distributions(
        log_density=_log_density(folder / "sparsity.safetensors", sae.d_sae),
        decoder_norm=sae.W_dec.norm(dim=1).cpu(),
        nearest=nearest_latents(sae.W_dec, queries, 1)[0][:, 0] if sae.d_sae > 1 else torch.zeros(0),
        encoder_cosine=F.cosine_similarity(sae.W_enc, sae.W_dec, dim=1).cpu() if same_space else None,
    )


def _log_density(path: Path, d_sae: int) -> Tensor | None:
    if not path.exists():
        return None
    values = read_safetensors(path).get("sparsity")
    if values is None or values.shape != (d_sae,):
        raise UserError(f"{path}: expected sparsity [{d_sae}]")
    return values.float()


def nearest_latents(decoder: Tensor, queries: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """For each latent of `queries` [n] the `number` others whose rows of `decoder` [d_sae, d] are most like its own.

    Returns cosines and latents, [n, number] each, on the CPU, the most like first.
    """
    unit = F.normalize(decoder.float(), dim=1)
    found = []
    for part in queries.to(unit.device).split(max(1, _SLAB_ELEMENTS // len(unit))):
        cosines = unit[part] @ unit.T
        cosines.scatter_(1, part[:, None], -torch.inf)
        found.append(cosines.topk(min(number, len(unit) - 1), dim=1))
    return torch.cat([f[0] for f in found]).cpu(), torch.cat([f[1] for f in found]).cpu()


def choose_latents(
    wanted: Sequence[int], number: int, d_sae: int, log_density: Tensor | None, seed: int, name: str
) -> list[int]:
    """The latents of SAE `name` to show: `wanted`, or `number` random ones that fired in training, ascending.

    Raises UserError for one that the SAE does not have.
    """
    if wanted:
        if max(wanted) >= d_sae:
            raise UserError(f"--latents {max(wanted)}: {name} has latents 0 to {d_sae - 1}")
        return sorted(set(wanted))
    candidates = torch.arange(d_sae) if log_density is None else (log_density > NEVER).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(derive_seed(seed, "latents", d_sae))
    picks = torch.randperm(len(candidates), generator=generator)[:number]
    return sorted(candidates[picks].tolist())


def histograms(all_of_them: Sequence[Distributions]) -> list[dict[str, Any]]:
    """For each SAE its histograms, {"lo", "hi", "share": of its latents in each bin}, with bins all SAEs share."""
    norms = [d.decoder_norm for d in all_of_them]
    norm_bins = _around(norms) if norms else (0.0, 1.0, 1)
    made = []
    for d in all_of_them:
        one: dict[str, Any] = {
            "norm": _histogram(d.decoder_norm, norm_bins),
            "nearest": _histogram(d.nearest, (0.0, 1.0, 50)),
        }
        if d.log_density is not None:
            fires = d.log_density > NEVER
            one["density"] = _histogram(d.log_density[fires], _DECADES, total=len(fires))
            one["never"] = 1 - fires.float().mean().item()
        if d.encoder_cosine is not None:
            one["encoder"] = _histogram(d.encoder_cosine, (-1.0, 1.0, 50))
        made.append(one)
    return made


def _around(values: Sequence[Tensor]) -> tuple[float, float, int]:
    """Bins for all `values`; about the one value that all have, where rows are kept at one norm."""
    low, high = min(v.min().item() for v in values), max(v.max().item() for v in values)
    if high - low < 0.01 * high:
        return 0.9 * low, 1.1 * high, 41
    return low, high, 40


def _histogram(values: Tensor, bins: tuple[float, float, int], total: int | None = None) -> dict[str, Any]:
    low, high, number = bins
    counts = torch.histc(values.float().clamp(low, high), number, low, high)
    share = (counts / max(total or len(values), 1)).tolist()
    return {"lo": low, "hi": high, "share": [float(f"{s:.4g}") for s in share]}
