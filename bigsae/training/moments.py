"""Adam for matrices whose moments are kept in bfloat16 or int8, or whose gradients come in bfloat16.

Rows are brought to float32 by chunks, updated there by torch's fused Adam, and rounded again: no float32 copy of a
whole matrix exists. As in 8-bit optimisers (Dettmers et al. 2021, arXiv 2110.02861), int8 codes belong to blocks with a
scale of their own, and are finer towards zero, where most of a moment's values are.

int8: blocks of 256 along a row, their largest magnitude in float32. A code q stands for q² of 127² parts of it. Of the
second moment the root is kept, in 255² parts; there the code 0 is not used: a second moment of 0 under a first one that
is not would make a step of any size.

Rounding is stochastic: a value becomes one of its two neighbours, with itself as the mean. To the nearest, a second
moment that a step lowers by a thousandth would never fall. The random bits are a hash of (seed, matrix, step, row,
column), rows counted over all ranks: the same on a resume, and for whatever chunks and ranks the rows come in.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adam import adam

from bigsae.parallel.memory import MOMENT_BLOCK as BLOCK

MomentsDtype = Literal["float32", "bfloat16", "int8"]

_LEVELS = {"exp_avg": 127, "exp_avg_sq": 255}
_SMALLEST_SCALE = 1e-36  # below it a block is as good as zero; without it, a block of zeros would be 0 / 0
# Elements that are in float32 at a time. On CPU what stays in the cache: two matrices [16384, 576] take 0.15 s in
# bfloat16 and 0.4 s in int8 on a Zen 4 core, where torch's own Adam in float32 takes 0.02. Else a 64th of a matrix,
# within what keeps launches busy.
_ON_CPU, _LEAST, _MOST = 2**16, 2**17, 2**22
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def row_chunks(matrix: Tensor) -> list[slice]:
    """Slices of rows in which to go through `matrix` [rows, cols], where each needs temporary memory."""
    on_cpu = matrix.device.type == "cpu"
    size = _ON_CPU if on_cpu else min(max(matrix.numel() // 64, _LEAST), _MOST)
    rows = max(size // max(matrix.shape[1], 1), 1)
    return [slice(start, start + rows) for start in range(0, len(matrix), rows)]


class ChunkedAdam(torch.optim.Optimizer):
    """Adam as torch's fused one, also in what `grad_scale` and `found_inf` do; see above for the `matrices`."""

    grad_scale: Tensor | None = None
    """Divides the gradients."""
    found_inf: Tensor | None = None
    """1. where nothing is to change, else 0."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        matrices: Mapping[str, nn.Parameter],
        betas: tuple[float, float],
        eps: float,
        moments: MomentsDtype,
        seed: int = 0,
        first_row: int = 0,
    ):
        """`matrices`: the parameters whose moments are kept in `moments`, by their names.

        `seed` and the names decide the random bits; `first_row` is the number of their first rows.
        """
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps})
        self._keys = {p: _signed(zlib.crc32(f"{seed} {name}".encode())) for name, p in matrices.items()}
        self._moments: MomentsDtype = moments
        self._first_row = first_row

    def empty_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What the first step of `parameter` starts from: a scalar `step`, and tensors that have its rows."""
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        rows, cols = len(parameter), parameter[:1].numel()
        if parameter not in self._keys or self._moments == "float32":
            return {"step": step} | {name: torch.zeros_like(parameter) for name in _LEVELS}
        if self._moments == "bfloat16":
            return {"step": step} | {
                name: torch.zeros_like(parameter, dtype=torch.bfloat16) for name in _LEVELS
            }
        scales = torch.zeros(rows, -(-cols // BLOCK), device=parameter.device)
        return {
            "step": step,
            "exp_avg": torch.zeros_like(parameter, dtype=torch.int8),
            "exp_avg_scale": scales,
            "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.uint8),
            "exp_avg_sq_scale": scales.clone(),
        }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.state[parameter] = self.empty_state(parameter)
                state = self.state[parameter]
                if parameter in self._keys:
                    self._update_matrix(parameter, parameter.grad, state, group)
                else:
                    self._fused(parameter, parameter.grad, state, group)

    def _fused(
        self, parameter: Tensor, gradient: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any]
    ) -> None:
        beta1, beta2 = group["betas"]
        adam(
            [parameter],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            grad_scale=self.grad_scale,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )

    def _update_matrix(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: Mapping[str, Any]
    ) -> None:
        step = state["step"].clone()
        for rows in row_chunks(parameter):
            step.copy_(state["step"])
            kept = {name: tensor[rows] for name, tensor in state.items() if name != "step"}
            weights = parameter[rows]
            if self._moments == "float32":
                self._fused(weights, gradient[rows].to(weights.dtype), kept | {"step": step}, group)
                continue
            wide = {name: read_moment(kept, name) for name in _LEVELS}
            wide_weights = weights.float()
            self._fused(wide_weights, gradient[rows].float(), wide | {"step": step}, group)
            if wide_weights.dtype != weights.dtype:
                weights.copy_(wide_weights)
            bits = self._random_bits(parameter, state["step"], rows.start, weights)
            for name, noise in (("exp_avg", bits & 0xFFFF), ("exp_avg_sq", (bits >> 16) & 0xFFFF)):
                for key, rounded in round_moment(wide[name], name, self._moments, noise).items():
                    _overwrite_(kept[key], rounded, self.found_inf)
        state["step"].copy_(step)

    def _random_bits(self, parameter: Tensor, step: Tensor, start: int, rows: Tensor) -> Tensor:
        """int32 like `rows`, which begin at row `start` of `parameter`."""
        key = _mix_(step.to(torch.int32) ^ self._keys[parameter])  # pyright: ignore[reportArgumentType]
        first = self._first_row + start
        numbers = torch.arange(first, first + len(rows), dtype=torch.int32, device=rows.device)
        columns = torch.arange(rows.shape[1], dtype=torch.int32, device=rows.device)
        return _mix_(_mix_(numbers ^ key).unsqueeze(1) ^ columns)


def read_moment(kept: Mapping[str, Tensor], name: str) -> Tensor:
    """Moment `name` ("exp_avg" or "exp_avg_sq") in float32, [rows, cols], from rows of a matrix's state."""
    codes = kept[name]
    if codes.dtype == torch.bfloat16:
        return codes.float()
    values = codes.float()
    blocks = _blocks(values.mul_(values.abs()))
    blocks *= kept[f"{name}_scale"].unsqueeze(2)
    values = blocks.flatten(1)[:, : codes.shape[1]]
    return values.square() if name == "exp_avg_sq" else values.contiguous()


def round_moment(wide: Tensor, name: str, moments: MomentsDtype, noise: Tensor) -> dict[str, Tensor]:
    """The rows of state that keep `wide` [rows, cols], rounded by `noise`, int32 of 16 random bits each."""
    if moments == "bfloat16":
        # Added below the bits that stay, they carry into these with the probability of the part that is cut off.
        return {name: ((wide.view(torch.int32) + noise) & -0x10000).view(torch.float32).bfloat16()}
    levels = _LEVELS[name]
    values = wide.sqrt() if name == "exp_avg_sq" else wide
    blocks = _blocks(values)
    scale = blocks.abs().amax(2).div_(levels**2)
    parts = (blocks / scale.clamp(min=_SMALLEST_SCALE).unsqueeze(2)).flatten(1)[:, : wide.shape[1]]
    signs, parts = parts.sign(), parts.abs()
    codes = parts.sqrt().floor_()
    above = parts.addcmul_(codes, codes, value=-1).div_(
        2 * codes + 1
    )  # the part of the way to the next code's square
    codes += above.mul_(0x10000) > noise
    codes.clamp_(1 if name == "exp_avg_sq" else 0, levels).mul_(signs)
    return {name: codes.to(torch.int8 if name == "exp_avg" else torch.uint8), f"{name}_scale": scale}


def _blocks(values: Tensor) -> Tensor:
    """[rows, blocks, BLOCK], zeros after the last column."""
    missing = -values.shape[1] % BLOCK
    return (F.pad(values, (0, missing)) if missing else values).unflatten(1, (-1, BLOCK))


def _overwrite_(kept: Tensor, new: Tensor, found_inf: Tensor | None) -> None:
    """Put `new` in place of `kept`, where `found_inf` is not 1."""
    if found_inf is None:
        kept.copy_(new)
        return
    # torch.where with one condition for all is ten times as slow on CPU as these three.
    integer = _INTEGERS[kept.element_size()]
    kept, new = kept.view(integer), new.view(integer)
    kept += (new - kept) * (1 - found_inf).to(integer)


def _signed(bits: int) -> int:
    """The int32 of these 32 bits."""
    return bits - 2**32 if bits >= 2**31 else bits


def _mix_(x: Tensor) -> Tensor:
    """A bijection of int32 in which every bit depends on every bit (lowbias32, Wellons 2018); in place."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x
