"""A TopK step asks the device for nothing: on a GPU the host runs ahead of it.

Operations whose result the host reads, or whose shape depends on values, are found on the CPU as well: there the step
is the same down to the kernels, and those are in Triton on a GPU. What a GPU itself says runs where there is one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bigsae.config import OptimConfig, SAEConfig
from bigsae.parallel.mesh import alone
from bigsae.training.trainer import SAETrainer

D_IN, D_SAE, BATCH = 24, 512, 64
# Read by the host, or of a size that it must be told.
WAITS = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::bincount",
    "aten::unique_consecutive",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::repeat_interleave.Tensor",
}


# What dispatches nothing where tensors are on the host already, so that it must be caught by name.
COPIES = ("tolist", "numpy", "cpu", "__array__")


class NoWaits(TorchDispatchMode):
    """Raises where an operation would have the host wait for the device."""

    def __enter__(self) -> Any:
        self.patch = pytest.MonkeyPatch()
        for name in COPIES:
            self.patch.setattr(torch.Tensor, name, _refuse)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.patch.undo()
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        masks = name in (
            "aten::index",
            "aten::index_put",
            "aten::index_put_",
            "aten::_index_put_impl_",
        ) and any(index is not None and index.dtype == torch.bool for index in args[1])
        if masks or name in WAITS or f"{name}.{func._schema.overload_name}" in WAITS:
            known = name == "aten::repeat_interleave" and kwargs.get("output_size") is not None
            if not known:
                raise RuntimeError(f"{func} waits for the device")
        return func(*args, **kwargs)


def _refuse(*_: Any, **__: Any) -> None:
    raise RuntimeError("a copy to the host waits for the device")


def trainer_and_batches(
    config: SAEConfig, device: torch.device, **optim: Any
) -> tuple[SAETrainer, list[torch.Tensor]]:
    """A trainer after its first steps, in which it may ask once for what it then knows."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(BATCH, D_IN, generator=generator).to(device) for _ in range(4)]
    trainer = SAETrainer(config, OptimConfig(warmup_steps=0, **optim), D_IN, 100, 0, alone(device))
    trainer.initialise(batches[0])
    trainer.train_step(batches[0])
    return trainer, batches[1:]


TOPK = [
    (SAEConfig(k=4, d_sae=D_SAE), {}),
    (SAEConfig(k=4, d_sae=D_SAE, multi_topk=True), {"accumulation_steps": 2}),
    (SAEConfig(k=4, d_sae=D_SAE, autocast=True), {"grad_dtype": "bfloat16"}),
    (SAEConfig(k=4, d_sae=D_SAE, normalize="layer_norm"), {"moments_dtype": "int8"}),
]
IDS = ["plain", "multi-topk", "bfloat16", "int8 moments"]


def test_waits_are_found():
    x = torch.randn(8)
    asks = (
        lambda: float(x.sum()), lambda: x[x > 0], lambda: x.nonzero(), lambda: bool((x > 0).all()),
        lambda: x.tolist(), lambda: x.cpu(), lambda: x.numpy(), lambda: x.index_put_((x > 0,), torch.zeros(8)),
    )  # fmt: skip
    for ask in asks:
        with NoWaits(), pytest.raises(RuntimeError, match="waits for the device"):
            ask()
    with NoWaits():
        torch.where(x > 0, x, 0.0).sum()


@pytest.mark.parametrize(("config", "optim"), TOPK[:1], ids=IDS[:1])
def test_topk_asks_nothing(config, optim):
    """On the CPU gradients that are added up, and bfloat16 ones, are made by parts whose ends the host reads."""
    trainer, batches = trainer_and_batches(config, torch.device("cpu"), **optim)
    with NoWaits():
        for x in batches:
            trainer.train_step(x)
    assert trainer.read_metrics()["l0"] == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize(("config", "optim"), TOPK, ids=IDS)
@pytest.mark.parametrize("dead", [False, True], ids=["all alive", "some dead"])
def test_topk_does_not_synchronise_a_gpu(config, optim, dead):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    device = torch.device("cuda")
    trainer, batches = trainer_and_batches(config, device, **optim)
    if dead:
        trainer.firing.num_tokens_since_fired[: D_SAE // 8] = trainer.firing.dead_after_tokens
        trainer.firing._ask_again_at = 0
        trainer.train_step(batches[0])  # compiles, and asks
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in batches:
            trainer.train_step(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
