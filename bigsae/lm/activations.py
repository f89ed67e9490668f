"""Activations out of a language model, and back into it. The one file that imports nnsight.

A trace runs the model's forward and hands over each hookpoint's value as it appears; `tracer.stop()` ends the forward
at the last one. nnsight wants the hookpoints in the order of execution (else OutOfOrderError), which `Site`s have.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from nnsight import NNsight
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from bigsae.lm.compiling import compiled_overlap
from bigsae.lm.hookpoints import Hookpoint, Site, activation_of, with_activation
from bigsae.lm.loading import num_dropped_layers, runs_under_autocast


class Extractor:
    """Reads activations from a loaded model, and runs the whole model with some of them replaced.

    Under FSDP every rank must make the same calls, as often: each forward gathers weights from all of them.
    """

    def __init__(self, model: PreTrainedModel, sites: Sequence[Site]) -> None:
        """`model` comes from `loading.load_lm`, `sites` (one at least) from `hookpoints.locate`, in its order."""
        if not sites:
            raise ValueError("an extractor needs at least one site")
        paths = {site.hookpoint.path for site in sites}
        if layer := compiled_overlap(model, paths):
            raise ValueError(f"{layer} was compiled: give load_lm all sites of this extractor")
        self.model = model
        self.sites = tuple(sites)
        envoys = _wrap(model, paths)
        self._hooked = [(site, envoys[site.hookpoint.path]) for site in self.sites]
        self._trace = self._hooked[0][1].trace
        self._device = next(model.parameters()).device
        self._autocast = runs_under_autocast(model)

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> dict[str, Tensor]:
        """Token ids `[rows, ctx]` (moved to the model's device) to `{hookpoint name: [rows, ctx, d_in]}`.

        On the model's device, in the order of the sites; no gradients. In the model's dtype, or under autocast in
        float32 or bfloat16, as each module gives it.
        """
        # Moved here: after a stop FSDP's root takes itself to be inside a forward and would not move them.
        ids = ids.to(self._device)
        taken: list[Tensor] = []
        try:
            with self._precision(), self._trace(input_ids=ids, fn=self.model) as tracer:
                for site, envoy in self._hooked:
                    value = envoy.output if site.hookpoint.side == "output" else envoy.input
                    activation = activation_of(value)
                    # What runs after may write into it in place; nothing runs after the last.
                    taken.append(activation if site is self.sites[-1] else activation.clone())
                tracer.stop()
        finally:
            self._reset()
        return {site.name: activation for site, activation in zip(self.sites, taken, strict=True)}

    @torch.no_grad()
    def splice(self, ids: Tensor, functions: Mapping[str, Callable[[Tensor], Tensor]]) -> Tensor:
        """Logits `[rows, ctx, vocab]` for ids `[rows, ctx]`, with activations replaced by functions of them.

        `functions` maps names of this extractor's sites to functions from `[rows, ctx, d_in]` to the same shape;
        the outcome is cast to the activation's dtype. Raises KeyError for another name, ValueError for another shape
        or for a model that was loaded without its last layers (`load_lm(..., all_layers=True)` has them).
        """
        if dropped := num_dropped_layers(self.model):
            raise ValueError(
                f"this model was loaded without its last {dropped} layers: it has no true logits"
            )
        unknown = functions.keys() - {site.name for site in self.sites}
        if unknown:
            raise KeyError(f"no site of this extractor: {sorted(unknown)[0]}")
        ids = ids.to(self._device)
        replaced = [
            (site, envoy, functions[site.name]) for site, envoy in self._hooked if site.name in functions
        ]
        results: list[Any] = []
        try:
            with self._precision(), self._trace(input_ids=ids, fn=self.model) as tracer:
                for site, envoy, function in replaced:
                    _replace(envoy, site.hookpoint, function)
                results.append(tracer.result)
        finally:
            self._reset()
        return results[0].logits

    def _precision(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast)

    def _reset(self) -> None:
        """Return FSDP to where it stands between two forwards: every group resharded, no forward under way.

        `tracer.stop()` leaves the forward by an exception and so skips FSDP's post-forward hooks;
        `FSDPModule.reset_iter_state` is torch's recovery from just that. It also empties the list of finished forwards
        that FSDP keeps for a backward, which without one would grow for ever.
        """
        if isinstance(self.model, FSDPModule):
            self.model.reset_iter_state()


@contextmanager
def replacing(
    model: PreTrainedModel,
    functions: Sequence[tuple[Hookpoint, Callable[[Tensor], Tensor]]],
    on_call: Callable[[Mapping[str, Any]], None],
) -> Iterator[None]:
    """A block within which each call of `model` runs with activations replaced by functions of them.

    `functions` come in the order in which a forward meets their hookpoints; each maps `[rows, ctx, d_in]` to the same
    shape, and the outcome is cast to the activation's dtype. `model.generate` calls the model once for each new token.
    Before each call `on_call` gets its arguments, by name. Blocks may be nested. Gradients pass through.
    """
    plain = model.forward
    names = list(inspect.signature(plain).parameters)
    envoys = _wrap(model, {hookpoint.path for hookpoint, _ in functions})
    trace = envoys[functions[0][0].path].trace

    @functools.wraps(plain)  # generate looks at the signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        on_call(dict(zip(names, args, strict=False)) | kwargs)
        results: list[Any] = []
        # nnsight is given a stand-in: it would move and batch the arguments, a cache among them.
        with trace(torch.empty(1), fn=lambda _: plain(*args, **kwargs)) as tracer:
            for hookpoint, function in functions:
                _replace(envoys[hookpoint.path], hookpoint, function)
            results.append(tracer.result)
        return results[0]

    own = vars(model).get("forward")
    model.forward = forward
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


def _wrap(model: nn.Module, paths: Iterable[str]) -> dict[str, Any]:
    """nnsight's envoys of the modules at `paths`, all of one interleaver.

    The hooked modules alone are wrapped, not the model: a wrapped module costs some microseconds in each forward,
    which on a GPU adds up over a hundred of them. A trace runs whatever `fn` it is given.
    """
    envoys: dict[str, Any] = {}
    interleaver = None
    for path in sorted(paths, key=len):  # an outer module comes before those within it, and wraps them too
        if path not in envoys:
            root = NNsight(model.get_submodule(path), path=path, interleaver=interleaver)
            interleaver = root.interleaver
            envoys.update(root.modules(names=True))
    return envoys


def _replace(envoy: Any, hookpoint: Hookpoint, function: Callable[[Tensor], Tensor]) -> None:
    """Within a trace: replace the activation by a function of it."""
    if hookpoint.side == "output":
        value = envoy.output
        envoy.output = with_activation(value, _apply(hookpoint, function, activation_of(value)))
    else:
        value = envoy.input
        envoy.input = with_activation(value, _apply(hookpoint, function, activation_of(value)))


def _apply(hookpoint: Hookpoint, function: Callable[[Tensor], Tensor], activation: Tensor) -> Tensor:
    with torch.autocast(activation.device.type, enabled=False):  # that is for the model alone
        spliced = function(activation)
    if spliced.shape != activation.shape:
        raise ValueError(
            f"the function for {hookpoint.name} gave {tuple(spliced.shape)}, not {tuple(activation.shape)}"
        )
    return spliced.to(activation.dtype)
