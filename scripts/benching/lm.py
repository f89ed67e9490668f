"""What nnsight's tracing costs beside a bare truncated forward."""

from __future__ import annotations

import argparse
from contextlib import suppress
from typing import Any

import torch

from benching.common import finish, paired_times, summarise


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `bench.py lm`."""
    parser.add_argument("--model", required=True, help="Hub id or folder")
    parser.add_argument("--hookpoint", default="model.layers.6")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--ctx-len", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")


class _Stop(Exception):
    pass


class Bare:
    """A truncated forward by a plain hook; it stays in the model."""

    def __init__(self, model: Any, site: Any):
        self.model = model
        self._taken: list[torch.Tensor] = []
        self._stop = True
        model.get_submodule(site.hookpoint.path).register_forward_hook(self._take)

    def _take(self, _module: Any, _args: Any, output: Any) -> None:
        from bigsae.lm.hookpoints import activation_of

        self._taken.append(activation_of(output))
        if self._stop:
            raise _Stop

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, *, stopped: bool = True) -> torch.Tensor:
        """[rows, ctx_len, d_in] of ids [rows, ctx_len]; the forward ends there, or at the end of the decoder."""
        self._stop = stopped
        self._taken.clear()
        with suppress(_Stop):
            self.model.base_model(input_ids=ids)
        return self._taken[0]


def run(arguments: argparse.Namespace) -> None:
    """A bare truncated forward, by a plain hook, against the traced one that training uses.

    The bare model is another copy, since nnsight stays in a model that it has once wrapped.
    """
    from bigsae.config import LMConfig
    from bigsae.lm.activations import Extractor
    from bigsae.lm.hookpoints import locate, resolve_hookpoints
    from bigsae.lm.loading import load_lm, meta_model, resolve_layout

    lm = LMConfig(dtype=arguments.dtype)
    device = torch.device(arguments.device)
    meta, config = meta_model(arguments.model, lm)
    sites = locate(meta, resolve_hookpoints([arguments.hookpoint], meta))
    if len(sites) != 1 or sites[0].hookpoint.side != "output":
        raise SystemExit("--hookpoint must name the output of one module")
    layout = resolve_layout(lm, 1, 1, {})
    bare, traced = (load_lm(arguments.model, lm, meta, layout, device, sites) for _ in range(2))
    extractor = Extractor(traced, sites)
    torch.manual_seed(0)
    ids = torch.randint(
        config.get_text_config().vocab_size, (arguments.rows, arguments.ctx_len), device=device
    )

    forward = Bare(bare, sites[0])

    functions = {
        "bare, stopped at the hookpoint": lambda: forward(ids),
        "bare, to the end of the cut decoder": lambda: forward(ids, stopped=False),
        "traced by nnsight, stopped": lambda: extractor(ids)[sites[0].name],
    }
    reference, *others = functions
    expected = functions[reference]()
    for name in others:
        if not torch.equal(functions[name](), expected):
            raise SystemExit(f"{name!r} gives other activations than {reference!r}: not timed")
    print(f"{sites[0].name}: {tuple(expected.shape)} {expected.dtype} on {device}, equal bit for bit")
    seconds = paired_times(functions, arguments.rounds, arguments.warmup)
    finish(arguments, summarise(seconds, reference), ["torch", "transformers", "nnsight"])
