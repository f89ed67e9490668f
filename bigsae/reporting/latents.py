"""The chosen latents: what their weights say, and one pass over the text for SAEs of the same model and text."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bigsae.config import TrainConfig, UserError
from bigsae.data.text import Text, open_text
from bigsae.data.tokenizer import vocabulary_size
from bigsae.lm.activations import Extractor
from bigsae.lm.hookpoints import locate, resolve_hookpoints
from bigsae.lm.layout import LMLayout
from bigsae.lm.loading import load_lm, meta_model
from bigsae.lm.micro_batch import activation_elements, with_rows
from bigsae.progress import Progress
from bigsae.reporting.contexts import Watched, contexts, watch
from bigsae.reporting.lens import Lens, find_lens, promoted
from bigsae.reporting.options import ReportConfig
from bigsae.reporting.texts import Texts
from bigsae.reporting.weights import NEVER, Distributions, nearest_latents
from bigsae.sae.base import SAE

_ALONE = LMLayout("replicate", 1, 1, "one process")
_NUM_PROMOTED = 10
_NUM_NEAREST = 5


@dataclass
class Shown:
    """An SAE whose latents are shown, and what is known of each."""

    name: str
    reads: str
    config: TrainConfig
    sae: SAE
    latents: list[int]
    values: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What the page gets, by latent."""
    about: dict[str, Any] = field(default_factory=dict)
    """What holds for all of them."""


@torch.no_grad()
def describe_weights(shown: Shown, found: Distributions) -> None:
    """Norms, frequencies and nearest latents."""
    queries = torch.tensor(shown.latents, dtype=torch.long)
    cosines, others = nearest_latents(shown.sae.W_dec, queries, _NUM_NEAREST)
    for row, latent in enumerate(shown.latents):
        pairs = zip(others[row].tolist(), cosines[row].tolist(), strict=True)
        shown.values[latent] = {
            "i": latent,
            "norm": _short(found.decoder_norm[latent].item()),
            "near": [[other, round(cosine, 3)] for other, cosine in pairs],
        }
        if found.log_density is not None:
            shown.values[latent]["density"] = _density(found.log_density[latent].item())


def describe_contexts(all_shown: Sequence[Shown], options: ReportConfig) -> list[str]:
    """Contexts and promoted tokens, and the table of the texts that they point into."""
    groups: dict[tuple[Any, ...], list[Shown]] = {}
    for shown in all_shown:
        c = shown.config
        # What decides language model and text: SAEs for which it is the same share a pass.
        groups.setdefault((c.model, c.dataset, c.lm, c.data, c.ctx_len, c.seed), []).append(shown)
    table: list[str] = []
    for group in groups.values():
        _describe_group(group, options, table)
    return table


def _describe_group(group: Sequence[Shown], options: ReportConfig, table: list[str]) -> None:
    config = group[0].config
    meta, lm_config = meta_model(config.model, config.lm)
    sites = locate(meta, resolve_hookpoints(list(dict.fromkeys(s.reads for s in group)), meta))
    _check_widths(group, {site.name: site.d_in for site in sites})
    text = open_text(
        config.dataset, config.data, config.model, config.lm, lm_config, config.ctx_len, with_tokenizer=True
    )
    ids = _first_rows(text, config.seed, options.num_rows)
    num_kept = int(text.kept(ids).sum())
    device = _device(options)
    model = load_lm(config.model, config.lm, meta, _ALONE, device, sites)
    lens = find_lens(model)
    watched = [Watched(s.sae.to(device), s.reads, s.latents) for s in group]
    with Progress("looking for contexts", len(ids), "rows") as progress:
        useful = options.num_rows * config.ctx_len
        # For this device, which need not be of the kind that the run had.
        lm = replace(config.lm, micro_batch_rows=None)
        lm = with_rows(lm, config.ctx_len, activation_elements(meta, sites), useful, device.type)
        batches = ids.split(lm.chosen_rows)
        acts = watch(watched, Extractor(model, sites), batches, text.kept, progress.reach)
    texts = Texts(text.tokenizer, table)
    for shown, own in zip(group, acts, strict=True):
        shown.about = {"rows": len(ids), "tokens": num_kept, "dataset": config.dataset}
        for column, latent in enumerate(shown.latents):
            shown.values[latent] |= contexts(own[:, :, column], ids, options, texts)
        _describe_promoted(shown, lens, vocabulary_size(text.tokenizer), texts)


def _check_widths(group: Sequence[Shown], widths: dict[str, int]) -> None:
    for shown in group:
        if shown.sae.d_in != widths[shown.reads]:
            raise UserError(
                f"--model {shown.config.model}: {shown.reads} is {widths[shown.reads]} wide, but the SAE "
                f"{shown.name} takes {shown.sae.d_in}"
            )


def _first_rows(text: Text, seed: int, number: int) -> Tensor:
    """Token ids [rows, ctx_len]: the first rows of an epoch, `number` of them or all."""
    with closing(text.rows(seed)) as rows:
        return torch.stack(list(itertools.islice(rows, number)))


def _device(options: ReportConfig) -> torch.device:
    if options.device is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(options.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {options.device} cannot be used: {reason}") from error
    return device


def _describe_promoted(shown: Shown, lens: Lens | None, num_tokens: int, texts: Texts) -> None:
    if lens is None or lens.width != shown.sae.d_out:
        what = f"takes {lens.width} dimensions" if lens is not None else "is not there"
        shown.about["no_lens"] = f"decoder rows have {shown.sae.d_out}, the unembedding {what}"
        return
    shown.about["lens"] = lens.description
    found = promoted(lens, shown.sae.W_dec[shown.latents], _NUM_PROMOTED, num_tokens)
    for row, latent in enumerate(shown.latents):
        for name, (ids, logits) in (("promotes", found.top), ("suppresses", found.bottom)):
            pairs = zip(ids[row].tolist(), logits[row].tolist(), strict=True)
            shown.values[latent][name] = [[texts(token), _short(logit)] for token, logit in pairs]


def _density(log_density: float) -> float:
    return _short(10**log_density) if log_density > NEVER else 0.0


def _short(value: float) -> float:
    return float(f"{value:.3g}")
