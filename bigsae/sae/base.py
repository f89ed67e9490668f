"""What every SAE is, whatever its architecture: weights, dense and sparse views of its latents, folding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bigsae.sae.losses import StepContext, StepOutput
from bigsae.seeds import derive_seed

# Rows that one seeded generator fills: any block of latents can be made without the ones before it.
_INIT_BLOCK = 4096


class SAE(nn.Module, ABC):
    """A sparse autoencoder. `W_enc` and `W_dec` are both `[d_sae, d_in]`: one latent, one row."""

    architecture: ClassVar[str]
    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_enc: nn.Parameter
    b_dec: nn.Parameter

    def __init__(self, d_in: int, d_sae: int, device: torch.device | str = "cpu"):
        super().__init__()
        self.d_in, self.d_sae = d_in, d_sae
        self.metadata: dict[str, Any] = {}
        self.W_enc = nn.Parameter(torch.empty(d_sae, d_in, device=device))
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_in, device=device))
        self.b_enc = nn.Parameter(torch.zeros(d_sae, device=device))
        self.b_dec = nn.Parameter(torch.zeros(d_in, device=device))

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Decoder rows in random directions at norm 1, the encoder their transpose (Gao et al. 2024), biases zero."""
        for start in range(0, self.d_sae, _INIT_BLOCK):
            generator = torch.Generator().manual_seed(derive_seed(seed, "W_dec", start))
            block = torch.randn(min(_INIT_BLOCK, self.d_sae - start), self.d_in, generator=generator)
            self.W_dec[start : start + len(block)] = block / block.norm(dim=1, keepdim=True)
        self.W_enc.copy_(self.W_dec)
        self.b_enc.zero_()
        self.b_dec.zero_()

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Latents of activations in the LM's own scale: `[..., d_in]` to dense `[..., d_sae]`."""

    def decode(self, latents: Tensor) -> Tensor:
        """Reconstruction from dense latents: `[..., d_sae]` to `[..., d_in]`."""
        return latents @ self.W_dec + self.b_dec

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction of `x` [..., d_in], and the number of latents > 0 in all of it."""
        latents = self.encode(x)
        return self.decode(latents), (latents > 0).sum()

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of `[..., d_in]`."""
        return self.reconstruct(x)[0]

    @abstractmethod
    def training_forward(self, x: Tensor, context: StepContext) -> StepOutput:
        """Loss and statistics of `x` [batch, d_in], this rank's part of a global batch, in the SAE's units."""

    @torch.no_grad()
    def fold_scale_(self, scale: float) -> None:
        """Turn an SAE of `scale`·x into one of x: biases and latents become 1/scale as large, weights stay."""
        self.b_enc.div_(scale)
        self.b_dec.div_(scale)

    @abstractmethod
    def saelens_config(self) -> dict[str, Any]:
        """What SAELens's cfg.json says of this architecture beyond the common fields."""

    def save(self, folder: str) -> None:
        """Write cfg.json and sae_weights.safetensors, SAELens's format, to `folder`."""
        # Opened when called: hub imports sae, and nothing imports the other way when it is loaded.
        from bigsae.hub.saelens import save_sae

        save_sae(self, folder)
