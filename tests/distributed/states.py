"""What a training has come to, of all ranks and latents, and whether two of them came to the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bigsae.parallel import collectives
from bigsae.training.trainer import SAETrainer

_MOST_CODES = 5  # of 9,216; 1 was seen


def described(trainer: SAETrainer) -> dict[str, Any]:
    """Everything about a finished training that must not depend on ranks and mesh."""
    exported, others = trainer.export(), (trainer.folded(), trainer.frequencies())
    assert (exported is None) == (trainer.mesh.rank > 0)
    sae, frequencies = exported or others
    return {
        "metrics": trainer.read_metrics(),
        "exported": sae.state_dict() | {"frequencies": frequencies},
    } | state(trainer)


def state(trainer: SAETrainer) -> dict[str, Any]:
    """Weights, all of the optimiser, and all statistics but those that a log reads."""
    return {
        "weights": {name: trainer._whole(name, t.detach()) for name, t in trainer.sae.state_dict().items()},
        "adam": {
            f"{name}/{key}": _of_all_rows(trainer, name, value)
            for name, values in trainer.update.state().items()
            for key, value in values.items()
        },
        "firing": {name: trainer._whole(name, t) for name, t in trainer.firing.tensors().items()},
        "frequencies": trainer.frequencies(),
        "counters": {key: value for key, value in trainer.counters().items() if key != "window"},
    }


def waiting(trainer: SAETrainer) -> dict[str, Any]:
    """What ranks have summed of their own tokens: for the next log, and for the next update."""
    metrics = trainer.window.read(trainer.mesh.data, trainer.mesh.latent) if trainer.window.num_steps else {}
    window = trainer.counters()["window"]
    return {"metrics": metrics, "window": window, "gathered": _gradients(trainer)}


def _gradients(trainer: SAETrainer) -> dict[str, Tensor]:
    found = {}
    for name, parameter in trainer.sae.named_parameters():
        gathered = (
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to(parameter, copy=True)
        )
        found[name] = trainer._whole(name, collectives.sum_(gathered, trainer.mesh.data))
    return found


def _of_all_rows(trainer: SAETrainer, name: str, tensor: Tensor) -> Tensor:
    group = trainer.mesh.data
    if trainer.update.sliced and name not in trainer.sae.shared and tensor.dim():
        parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(parts, tensor, group=group)
        tensor = torch.cat(parts)
    return trainer._whole(name, tensor)


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """`described`, of two trainings whose sums were rounded in another order."""
    assert_same_state(ours, theirs)
    assert ours["exported"].keys() == theirs["exported"].keys()
    for name, tensor in ours["exported"].items():
        torch.testing.assert_close(tensor, theirs["exported"][name], rtol=0, atol=1e-5, msg=name)
    assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-5)


def assert_same_state(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """`state`, likewise. Codes of 8 bits that lie at the edge between two may be rounded to either, a few of them."""
    of_codes = any(not t.is_floating_point() for t in ours["adam"].values())
    assert ours.keys() == theirs.keys()
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, weights in ours["weights"].items():
        error = (weights - theirs["weights"][name]).abs()
        assert error.max() < (1e-4 if of_codes else 1e-6), name
        assert (error > 1e-6).sum() <= _MOST_CODES, name
    assert ours["adam"].keys() == theirs["adam"].keys()
    for name, tensor in ours["adam"].items():
        assert_same_moments(name, tensor, theirs["adam"][name])
    for name, counts in ours["firing"].items():
        # A pre-activation of 0 is rounded to either side of it: 1 firing of 76,377 was seen to differ.
        assert (counts - theirs["firing"][name]).abs().sum() <= (2 if name == "window_counts" else 0), name
    assert torch.equal(ours["frequencies"], theirs["frequencies"])
    assert flat(ours["counters"]) == pytest.approx(flat(theirs["counters"]), rel=1e-12)


def assert_same_moments(name: str, ours: Tensor, theirs: Tensor) -> None:
    """`theirs` but for rounding, of which a few codes may be the next one."""
    if not ours.is_floating_point():
        error = (ours.short() - theirs.short()).abs()
        assert error.max() <= 1 and error.sum() <= _MOST_CODES, name
        return
    absolute = 1e-10 if "exp_avg_sq" in name else 1e-6
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=absolute, msg=lambda text: f"{name}: {text}")


def assert_read_back(ours: Any, theirs: Any) -> None:
    """Bit for bit."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_read_back(ours[key], theirs[key])
    elif isinstance(ours, Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    else:
        assert ours == theirs


def assert_close(ours: Any, theirs: Any) -> None:
    """But for the order of sums over ranks."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_close(ours[key], theirs[key])
    elif isinstance(ours, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    else:
        assert ours == pytest.approx(theirs, rel=1e-12)


def flat(numbers: dict[str, Any]) -> dict[str, Any]:
    """One level deep, as pytest.approx wants it."""
    inner = {f"firing/{key}": value for key, value in numbers["firing"].items()}
    return {key: value for key, value in numbers.items() if key != "firing"} | inner
