"""What every SAE is, whatever its architecture: weights, dense and sparse views of its latents, folding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from bigsae.kernels.batchtopk import batchtopk_encode
from bigsae.kernels.centre import centre
from bigsae.kernels.encode import Selection, select
from bigsae.kernels.encode_above import encode_above, encode_dense
from bigsae.kernels.pairs import DensePairs, RaggedPairs
from bigsae.kernels.topk_pairs import OwnOfTopK, TopK, own_selection, topk_pairs
from bigsae.parallel import collectives
from bigsae.parallel.latents import Latents
from bigsae.sae.losses import StepContext, StepOutput
from bigsae.seeds import derive_seed

# Rows that one seeded generator fills: any block of latents can be made without the ones before it.
_INIT_BLOCK = 4096
# SAELens's: added to the deviation, not to the variance.
_LAYER_NORM_EPS = 1e-5
_PAIRS_AT_ONCE = 2**25
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Shape:
    """What an SAE of any architecture is built from."""

    d_in: int
    d_sae: int
    d_out: int | None = None
    """Width of a transcoder's output; None for an SAE, which reconstructs its input."""
    skip: bool = False
    """Whether a transcoder has a linear path from input to output."""
    apply_b_dec_to_input: bool = True
    """Whether an SAE subtracts b_dec from the encoder's input."""
    normalize: Literal["none", "layer_norm"] = "none"
    """What the SAE does to each token before encoding, and undoes after decoding."""
    autocast: bool = False
    """Whether the encoder's matmul runs in bfloat16."""
    slab_mb: int = 256
    """MiB of pre-activations that exist at a time."""
    latents: Latents = field(default_factory=Latents)
    """Which part of the latents this rank holds, and with whom; by default all of them."""


class SAE(nn.Module, ABC):
    """A sparse autoencoder, or a transcoder. `W_enc` is `[d_sae, d_in]`, `W_dec` `[d_sae, d_out]`, a row a latent.

    In training a rank may hold a part of the latents alone, `d_own` of them; then all that has a row a latent has
    `d_own` rows, and the ranks of `shape.latents` make the same calls with the same tokens.
    """

    architecture: ClassVar[str]
    loss_parts: ClassVar[tuple[str, ...]] = ()
    """Names of the weighted parts of the loss that are logged."""
    uses_density: ClassVar[bool] = False
    """Whether the training forward has a sparse and a dense path."""
    compares_latents: ClassVar[bool] = False
    """Whether latents are selected by comparing them with each other, and not each with its threshold."""
    encoder_biases: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Parameters [d_sae] that are in the units of pre_acts: the biases, and thresholds."""
    shared: ClassVar[tuple[str, ...]] = ("b_dec", "W_skip")
    """Parameters that are no latent's own; all others have a row for each latent."""
    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    def __init__(self, shape: Shape, device: torch.device | str = "cpu"):
        super().__init__()
        self.shape = shape
        self.d_in, self.d_sae = shape.d_in, shape.d_sae
        self.d_own = shape.d_sae // shape.latents.num_ranks
        self.d_out = shape.d_out if shape.d_out is not None else shape.d_in
        self.metadata: dict[str, Any] = {}
        self.W_enc = nn.Parameter(torch.empty(self.d_own, self.d_in, device=device))
        self.W_dec = nn.Parameter(torch.empty(self.d_own, self.d_out, device=device))
        for name in self.encoder_biases:
            self.register_parameter(name, nn.Parameter(torch.zeros(self.d_own, device=device)))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out, device=device))
        self.W_skip = nn.Parameter(torch.zeros(self.d_out, self.d_in, device=device)) if shape.skip else None

    @property
    def is_transcoder(self) -> bool:
        """Whether it predicts something else than its input."""
        return self.shape.d_out is not None

    @torch.no_grad()
    def initialise(self, seed: int, decoder_norm: float = 1.0) -> None:
        """Decoder rows in random directions at norm `decoder_norm`, biases zero.

        An SAE's encoder starts as its decoder (Gao et al. 2024), at a scale that `calibrate` may set; a transcoder's,
        whose input is another space, in random directions of its own.
        """
        first = self.shape.latents.rank * self.d_own
        _fill_with_directions(self.W_dec, seed, "W_dec", decoder_norm, first, self.d_sae)
        if self.is_transcoder:
            _fill_with_directions(self.W_enc, seed, "W_enc", 1.0, first, self.d_sae)
        else:
            self.W_enc.copy_(self.W_dec)

    def take_over(self, values: Mapping[str, Tensor]) -> None:
        """Take what another architecture's SAE has beside the parameters that both have."""

    @torch.no_grad()
    def calibrate(self, x: Tensor, context: StepContext) -> None:
        """Set what is better not started blindly from this rank's first tokens `x` [tokens, d_in], in SAE's units."""

    @torch.no_grad()
    def match_scale_(self, x: Tensor, decoded: Tensor, group: ProcessGroup | None) -> Tensor:
        """Scale the encoder so that x̂ is closest to x, from what own latents of `x` [tokens, d_in] add up to now.

        Decoder rows in random directions are far from orthogonal: what k of them were selected for adds up to several
        times x, and a start at an FVU of 10 costs latents that the first steps push away. Returns the factor, [].
        """
        decoded = self.shape.latents.sum_(decoded)
        products = torch.zeros(2, dtype=torch.float64, device=x.device)
        for rows, recon in zip(x.split(_ROWS_AT_ONCE), decoded.split(_ROWS_AT_ONCE), strict=True):
            products[0] += ((rows - self.b_dec) * recon).sum(dtype=torch.float64)
            products[1] += recon.square().sum(dtype=torch.float64)
        collectives.sum_(products, group)
        factor = products[0] / products[1]
        factor = torch.where(factor.isfinite() & (factor > 0), factor, 1.0)
        self.W_enc.mul_(factor)
        return factor

    def encoder_input(self, x: Tensor) -> Tensor:
        """What the encoder's matrix is applied to, for `x` [batch, d_in] in the SAE's units."""
        centred = x.to(self.W_enc.dtype)
        if self.shape.apply_b_dec_to_input and not self.is_transcoder:
            centred = centred - self.shape.latents.share(self.b_dec)
        return centred.bfloat16() if self.shape.autocast else centred

    def centred(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """As `encoder_input`, but b_dec has its gradient from that of the `bias` that is returned (centre.py)."""
        centred = x.to(self.W_enc.dtype)
        if self.shape.apply_b_dec_to_input and not self.is_transcoder:
            centred, bias = centre(centred, self.W_enc, bias, self.shape.latents.share(self.b_dec))
        return centred.bfloat16() if self.shape.autocast else centred, bias

    def encode_pairs(
        self, encoder_input: Tensor, bias: Tensor, bound: Tensor, sparse: bool
    ) -> tuple[Tensor, DensePairs | RaggedPairs]:
        """pre_acts of all pairs (token, latent), or only (`sparse`) of those above `bound`, [] or [d_sae]."""
        if sparse:
            rows = self.slab_rows(encoder_input.dtype)
            return encode_above(encoder_input, self.W_enc, bias, bound, slab_rows=rows)
        return encode_dense(encoder_input, self.W_enc, bias)

    def selection(self, k: int, mask: Tensor | None = None) -> Selection:
        """Of the k largest pre_acts of each token, of all latents or of those where `mask` [d_own] is True."""
        return own_selection(k, self.d_own, self.shape.latents.num_ranks, mask)

    def topk(
        self, selection: Selection, encoder_input: Tensor, bias: Tensor, *, relu: bool = True
    ) -> TopK | OwnOfTopK:
        """The largest pre_acts of each token, of all ranks' latents, from a filled selection; differentiable."""
        latents = self.shape.latents
        return topk_pairs(
            selection,
            encoder_input,
            self.W_enc,
            bias,
            latents.rank,
            latents.num_ranks,
            latents.gather if latents.num_ranks > 1 else None,
            relu=relu,
            slab_rows=self.slab_rows(encoder_input.dtype),
        )

    def encode_topk(
        self, encoder_input: Tensor, bias: Tensor, k: int, *selections: Selection
    ) -> TopK | OwnOfTopK:
        """The k largest pre_acts of each token, of all latents; `selections` are filled from the same pre_acts."""
        largest = self.selection(k)
        rows = self.slab_rows(encoder_input.dtype)
        select(encoder_input, self.W_enc, bias, (largest, *selections), rows)
        return self.topk(largest, encoder_input, bias)

    def encode_batchtopk(
        self,
        encoder_input: Tensor,
        bias: Tensor,
        num_keep: int,
        guess: Tensor | None,
        context: StepContext,
        *selections: Selection,
    ) -> tuple[Tensor, RaggedPairs, Tensor]:
        """The `num_keep` largest positive pre_acts of all tokens and latents; of them this rank's, and the smallest.

        `selections` are filled from the same pre_acts.
        """
        first, rows = self.shape.latents.rank * self.d_own, self.slab_rows(encoder_input.dtype)
        return batchtopk_encode(
            encoder_input,
            self.W_enc,
            bias,
            num_keep,
            guess,
            context.ranks,
            first=first,
            slab_rows=rows,
            selections=selections,
        )

    def slab_rows(self, dtype: torch.dtype) -> int:
        """Tokens whose pre-activations exist at a time, in `dtype`."""
        return max(1, self.shape.slab_mb * 2**20 // (self.d_own * dtype.itemsize))

    def output(self, x: Tensor, decoded: Tensor) -> Tensor:
        """Reconstruction [batch, d_out] from what this rank's latents of `x` [batch, d_in] add up to."""
        recon = self.shape.latents.sum(decoded) + self.b_dec
        return recon if self.W_skip is None else recon + x.to(self.W_skip.dtype) @ self.W_skip.T

    @abstractmethod
    def latents(self, x: Tensor) -> Tensor:
        """Dense latents [batch, d_sae] of `x` [batch, d_in] in the SAE's units."""

    def encode(self, x: Tensor) -> Tensor:
        """Latents of activations in the LM's own scale: `[..., d_in]` to dense `[..., d_sae]`."""
        assert self.d_own == self.d_sae
        rows, _ = self._normalise(x)
        return self.latents(rows).to(self.W_enc.dtype).view(*x.shape[:-1], self.d_sae)

    def decode(self, latents: Tensor) -> Tensor:
        """Reconstruction from dense latents: `[..., d_sae]` to `[..., d_out]`.

        Under layer_norm in units of the normalised token, and without a transcoder's skip: only the input, which
        `forward` and `reconstruct_from` have, tells how to undo the one and compute the other.
        """
        return latents @ self.W_dec + self.b_dec

    def reconstruct_from(self, x: Tensor, latents: Tensor) -> Tensor:
        """Reconstruction `[..., d_out]` of `x` `[..., d_in]` from other latents `[..., d_sae]` than its own.

        From `encode(x)` it is `forward(x)`, to rounding: a transcoder's skip is added, layer_norm undone.
        """
        rows, undo = self._normalise(x)
        recon = self.output(rows, latents.reshape(-1, self.d_sae) @ self.W_dec)
        if undo is not None:
            recon = recon * undo[1] + undo[0]
        return recon.view(*x.shape[:-1], self.d_out)

    def decode_change(self, x: Tensor, change: Tensor) -> Tensor:
        """What adding `change` `[..., d_sae]` to the latents of `x` `[..., d_in]` adds to its reconstruction.

        `[..., d_out]`; exactly zero where `change` is.
        """
        decoded = change @ self.W_dec
        _, undo = self._normalise(x)
        return decoded if undo is None else decoded * undo[1].view(*x.shape[:-1], 1)

    def decoded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What this rank's latents of `x` [batch, d_in] add up to, [batch, d_out], and how many are > 0 in all."""
        latents = self.latents(x).to(self.W_dec.dtype)
        return latents @ self.W_dec, (latents > 0).sum()

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction of `x` [..., d_in], and the number of latents > 0 in all of it."""
        rows, undo = self._normalise(x)
        # In parts: where many latents fire, as early in an L1 SAE's training, their pairs outgrow a dense matrix.
        parts, counts = zip(*map(self.decoded, rows.split(max(_PAIRS_AT_ONCE // self.d_own, 1))), strict=True)
        num_active = self.shape.latents.sum_(torch.stack(counts).sum())
        recon = self.output(rows, torch.cat(parts))
        if undo is not None:
            recon = recon * undo[1] + undo[0]
        return recon.view(*x.shape[:-1], self.d_out), num_active

    def _normalise(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """`x` as rows in the SAE's units; under layer_norm also each token's mean and deviation, [batch, 1]."""
        rows = x.to(self.W_enc.dtype).reshape(-1, self.d_in)
        return layer_norm(rows) if self.shape.normalize == "layer_norm" else (rows, None)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of `[..., d_in]`; a transcoder's prediction, `[..., d_out]`."""
        return self.reconstruct(x)[0]

    @abstractmethod
    def training_forward(self, x: Tensor, y: Tensor, context: StepContext) -> StepOutput:
        """Loss and statistics of inputs `x` [batch, d_in] and targets `y` [batch, d_out], this rank's part of a batch.

        Both in the SAE's units; an SAE's targets are its inputs.
        """

    def cast_(self, dtype: torch.dtype) -> None:
        """Bring the parameters to `dtype`."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)

    @torch.no_grad()
    def constrain_(self) -> None:
        """Bring parameters back to where they are defined, after a step."""

    @torch.no_grad()
    def fold_scales_(self, s_in: float, s_out: float) -> None:
        """Turn the map s_in·x -> s_out·y into that of x -> y.

        Latents and all in their units become 1 / s_in as large. Where both are one, all matrices stay.
        """
        for name in self.encoder_biases:
            self.get_parameter(name).div_(s_in)
        self.W_dec.mul_(s_in / s_out)
        self.b_dec.div_(s_out)
        if self.W_skip is not None:
            self.W_skip.mul_(s_in / s_out)

    @abstractmethod
    def saelens_config(self) -> dict[str, Any]:
        """What SAELens's cfg.json says of this SAE beyond the common fields: its `architecture` there, and more."""

    def saelens_tensors(self) -> dict[str, Tensor]:
        """Its tensors under SAELens's names, in bigsae's layout."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def save(self, folder: str) -> None:
        """Write the SAE to `folder`: SAELens's format, or for TopK transcoders, which SAELens lacks, sparsify's."""
        # Opened when called: hub imports sae, and nothing imports the other way when it is loaded.
        from bigsae.hub.formats import save_sae

        save_sae(self, folder)


def layer_norm(rows: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Each row of `[batch, d_in]` at mean 0 and deviation 1, as SAELens; and the means and deviations, [batch, 1]."""
    mean = rows.mean(1, keepdim=True)
    centred = rows - mean
    deviation = centred.std(1, keepdim=True)
    return centred / (deviation + _LAYER_NORM_EPS), (mean, deviation)


def _fill_with_directions(
    weight: Tensor, seed: int, name: str, norm: float, first: int, num_rows: int
) -> None:
    """Rows of random directions; `weight` holds those from row `first` on of a matrix of `num_rows`."""
    stop = first + len(weight)
    for start in range(first // _INIT_BLOCK * _INIT_BLOCK, stop, _INIT_BLOCK):
        generator = torch.Generator().manual_seed(derive_seed(seed, name, start))
        # Whole blocks, whoever holds them: the beginning of a longer randn need not be a shorter one.
        block = torch.randn(min(_INIT_BLOCK, num_rows - start), weight.shape[1], generator=generator)
        begin, end = max(start, first), min(start + _INIT_BLOCK, stop)
        block = block[begin - start : end - start]
        weight[begin - first : end - first] = norm * block / block.norm(dim=1, keepdim=True)
