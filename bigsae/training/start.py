"""Starting from a trained SAE (--sae.init-from)."""

from __future__ import annotations

from pathlib import Path

import torch

from bigsae.config import SAEConfig, UserError, named
from bigsae.sae.base import SAE

# What an SAE can start from beside its own kind: batchtopk and matryoshka are stored as jumprelu.
_STARTS = {"batchtopk": ("jumprelu", "topk"), "matryoshka": ("jumprelu", "topk")}
# bfloat16 holds a norm of 1 to this.
_UNIT_TOLERANCE = 2**-7


def load_start(config: SAEConfig, hookpoint: str | None = None, only: bool = True) -> SAE | None:
    """The SAE that `config.init_from` names, if it names one: a folder, or the folder's folder for `hookpoint`.

    `only` says that no other hookpoint is trained, so that it may be one SAE's own folder.
    """
    if config.init_from is None:
        return None
    # Opened when used: the step itself needs no file formats.
    from bigsae.hub.formats import read_sae

    folder = Path(config.init_from)
    if hookpoint is not None and (folder / hookpoint).is_dir():
        folder = folder / hookpoint
    elif not only:
        raise UserError(
            f"--sae.init-from {folder} has no folder {hookpoint}: with several --hookpoints each needs one"
        )
    with named("--sae.init-from"):
        return read_sae(folder)


@torch.no_grad()
def copy_weights(source: SAE, sae: SAE) -> None:
    """Give `sae` the weights of `source`, in whose scale it then is. Raises UserError where they do not fit."""
    kinds = (sae.architecture, *_STARTS.get(sae.architecture, ()))
    if source.architecture not in kinds:
        raise UserError(
            f"--sae.init-from holds a {source.architecture} SAE: set --sae.architecture {source.architecture} "
            f"({sae.architecture} starts from {', '.join(kinds)})"
        )
    for what in ("d_in", "d_out", "d_sae", "is_transcoder"):
        theirs, ours = getattr(source, what), getattr(sae, what)
        if theirs != ours:
            fix = f"set --sae.d-sae {theirs}" if what == "d_sae" else "it was trained on other activations"
            raise UserError(f"--sae.init-from holds an SAE of {what} {theirs}, not {ours}: {fix}")
    for field, flag in (
        ("normalize", "--sae.normalize"),
        ("skip", "--sae.skip"),
        ("apply_b_dec_to_input", "--sae.apply-b-dec-to-input"),
    ):
        theirs, ours = getattr(source.shape, field), getattr(sae.shape, field)
        if theirs != ours and not (field == "apply_b_dec_to_input" and sae.is_transcoder):
            raise UserError(
                f"--sae.init-from holds an SAE with {field} {theirs}, not {ours}: set {flag} to it"
            )
    values = dict(source.named_parameters())
    for name, parameter in sae.named_parameters():
        value = values.pop(name)
        parameter.copy_(value if name in sae.shared else sae.shape.latents.own(value))
    sae.take_over(values)


@torch.no_grad()
def unit_decoder_(sae: SAE) -> None:
    """Bring decoder rows to norm 1; their norms go into the encoder, biases and thresholds: the same function.

    Not of an SAE that compares latents with each other, which that would change: a UserError where it matters.
    """
    norms = sae.W_dec.norm(dim=1)
    # Of all ranks' rows, so that all of them stop.
    num_other = sae.shape.latents.sum_(((norms - 1).abs() > _UNIT_TOLERANCE).sum())
    if sae.compares_latents and num_other:
        raise UserError(
            f"--sae.init-from holds a {sae.architecture} SAE whose decoder rows are not at norm 1: set "
            "--sae.normalize-decoder False"
        )
    norms = norms.clamp(min=1e-12)
    sae.W_dec.div_(norms.unsqueeze(1))
    sae.W_enc.mul_(norms.unsqueeze(1))
    for name in sae.encoder_biases:
        sae.get_parameter(name).mul_(norms)
