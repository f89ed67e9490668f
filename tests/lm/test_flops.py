"""Counted operations of a forward that ends at a hookpoint are torch's count of just that forward."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from bigsae.config import LMConfig
from bigsae.lm.flops import forward_work
from bigsae.lm.hookpoints import locate, resolve_hookpoints
from bigsae.lm.loading import meta_model

CTX_LEN = 32


class Stop(Exception):
    pass


def torch_s_count(folder, path: str, side: str) -> tuple[float, float]:
    """Of a token: attention's matmuls of queries, keys and values, on all pairs of positions; and all others."""
    # The ops of other implementations are not all known to torch's counter.
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager"
    )
    module = model.get_submodule(path)

    def stop(*_) -> None:
        raise Stop

    if side == "output":
        module.register_forward_hook(stop)
    else:
        module.register_forward_pre_hook(stop)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), pytest.raises(Stop):
        model(input_ids=torch.zeros(2, CTX_LEN, dtype=torch.long))
    counts = dict(counter.get_flop_counts().get("Global", {}))
    attention = counts.pop(torch.ops.aten.bmm, 0)
    return attention / (2 * CTX_LEN), sum(counts.values()) / (2 * CTX_LEN)


@pytest.mark.parametrize(
    ("hookpoint", "num_attentions"),
    [
        ("model.layers.0:input", 0),
        ("model.layers.1.input_layernorm", 1),
        ("model.layers.1.self_attn", 2),
        ("model.layers.1.mlp", 2),
        ("model.layers.1", 2),
        ("model.layers.1.mlp.down_proj:input", 2),
    ],
)
def test_what_runs_of_the_last_layer_counts(model_folders, hookpoint, num_attentions):
    meta, _ = meta_model(str(model_folders["llama"]), LMConfig())
    sites = locate(meta, resolve_hookpoints([hookpoint], meta))
    work = forward_work(meta, sites)
    assert work.attention_width == num_attentions * 32
    path, side = sites[0].hookpoint.path, sites[0].hookpoint.side
    attention, others = torch_s_count(model_folders["llama"], path, side)
    assert others == 2 * work.matmul_weights
    # The angles of the positions are a small bmm as well.
    assert attention == pytest.approx(2 * 2 * CTX_LEN * work.attention_width, rel=0.01, abs=16)
    assert work.flops(CTX_LEN) == others + CTX_LEN * 2 * work.attention_width  # causal: half of the pairs


def test_every_architecture_s_forward(model_folder):
    """Up to a layer of each model: dense ones by torch's count; of experts those that a token takes."""
    meta, _ = meta_model(str(model_folder), LMConfig())
    layer = next(name for name, _ in meta.named_modules() if name.endswith(".2"))
    work = forward_work(meta, locate(meta, resolve_hookpoints([layer], meta)))
    assert work.attention_width == 3 * 32
    _, others = torch_s_count(model_folder, layer, "output")
    assert others == 2 * work.matmul_weights
