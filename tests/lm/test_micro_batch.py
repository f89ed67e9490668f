"""The rows of a forward that are chosen, and what such a forward takes of memory."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from bigsae.config import LMConfig
from bigsae.lm.activations import Extractor
from bigsae.lm.hookpoints import Site, locate, resolve_hookpoints
from bigsae.lm.micro_batch import activation_elements, choose_rows, with_rows
from bigsae.parallel.memory import DTYPE_BYTES

PLENTY = 1 << 40
GIB = 1 << 30


def llama(hidden: int, intermediate: int, heads: int, kv_heads: int) -> LlamaConfig:
    """As wide as it says; two layers and few words, which decide nothing here."""
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads, num_hidden_layers=2,
        num_key_value_heads=kv_heads, vocab_size=128, max_position_embeddings=4096,
    )  # fmt: skip


MODELS: dict[str, PreTrainedConfig] = {
    "tiny": llama(32, 64, 4, 2),
    "SmolLM2-135M": llama(576, 1536, 9, 3),
    "GPT-2": GPT2Config(n_layer=2, vocab_size=128, n_positions=4096),
    "Llama-3-8B": llama(4096, 14336, 32, 8),
    "Llama-3-70B": llama(8192, 28672, 64, 8),
    "Llama-3-405B": llama(16384, 53248, 128, 8),
    "Qwen3-30B-A3B": Qwen3MoeConfig(
        hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, head_dim=128,
        num_attention_heads=32, num_key_value_heads=4, num_hidden_layers=2, vocab_size=128,
    ),
}  # fmt: skip


def on_meta(name: str) -> tuple[Any, tuple[Site, ...]]:
    """The model without weights, and its second layer's output."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.bfloat16).eval()
    layer = "transformer.h.1" if name == "GPT-2" else "model.layers.1"
    return model, locate(model, resolve_hookpoints([layer], model))


def chosen(name: str, lm: LMConfig, ctx_len: int, useful: int, device: str) -> int:
    return with_rows(lm, ctx_len, activation_elements(*on_meta(name)), useful, device).chosen_rows


BF16, F32 = LMConfig(dtype="bfloat16"), LMConfig(dtype="float32")


@pytest.mark.parametrize(
    ("name", "lm", "ctx_len", "useful", "device", "rows"),
    [
        ("Llama-3-405B", BF16, 1024, PLENTY, "cuda", 4),
        ("Llama-3-70B", BF16, 1024, PLENTY, "cuda", 8),
        ("Llama-3-70B", BF16, 2048, PLENTY, "cuda", 4),
        ("Llama-3-70B", F32, 2048, PLENTY, "cuda", 2),
        ("Llama-3-8B", BF16, 1024, PLENTY, "cuda", 8),
        ("Llama-3-8B", BF16, 256, PLENTY, "cuda", 32),
        ("Qwen3-30B-A3B", BF16, 4096, PLENTY, "cuda", 2),
        ("GPT-2", F32, 128, PLENTY, "cuda", 64),
        ("SmolLM2-135M", BF16, 256, 131_072, "cuda", 32),
        ("SmolLM2-135M", BF16, 300, 131_072, "cuda", 16),  # a power of two: 27 would fit
        ("SmolLM2-135M", F32, 256, 8192, "cpu", 8),  # the quickstart, half of whose buffer is 8,192
        ("SmolLM2-135M", F32, 256, 1024, "cpu", 4),
        ("SmolLM2-135M", F32, 4096, PLENTY, "cpu", 1),
        ("Llama-3-70B", F32, 1024, PLENTY, "cpu", 2),
        ("tiny", F32, 16, 128, "cpu", 8),
        ("tiny", F32, 16, 0, "cpu", 1),
    ],
)
def test_real_shapes(name, lm, ctx_len, useful, device, rows):
    assert chosen(name, lm, ctx_len, useful, device) == rows


def test_one_that_is_given_stays():
    lm = LMConfig(micro_batch_rows=3)
    assert with_rows(lm, 256, 1e9, 1, "cuda") is lm


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("bytes_per_token", [64, 254e3, 1e6, 1e12])
def test_longer_rows_are_fewer_and_no_bound_is_passed(device, bytes_per_token):
    found = {n: choose_rows(n, bytes_per_token, 4096, device) for n in (2, 16, 100, 256, 1000, 1024, 5000)}
    assert all(a >= b for a, b in itertools.pairwise(found.values()))
    for ctx_len, rows in found.items():
        assert rows.bit_count() == 1
        bound = min(4096, 2048 if device == "cpu" else 8192, 2 * GIB / bytes_per_token)
        assert rows == 1 or rows * ctx_len <= bound
        assert 2 * rows * ctx_len > bound  # twice as many would be too many


class Peak(TorchDispatchMode):
    """The most bytes of storages that were made within it, and lived, at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):  # weights and ids: they were there
            self._seen.setdefault(storage, 0)
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage not in self._seen:
                self._seen[storage] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _free(self, size: int) -> None:
        self.now -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [t.untyped_storage() for t in tree_leaves(values) if isinstance(t, Tensor)]


def harvested(values: Tensor) -> Tensor:
    """What the harvest keeps of an activation: all but position 0."""
    keep = torch.arange(values.shape[0] * values.shape[1]).view(values.shape[:2])[:, 1:].flatten()
    return values.flatten(0, 1)[keep]


def test_a_real_forward_stays_within_the_estimate():
    """Of SmolLM2's widths, by the run's own extractor."""
    model = AutoModelForCausalLM.from_config(MODELS["SmolLM2-135M"], dtype=torch.float32).eval()
    sites = on_meta("SmolLM2-135M")[1]
    extract, ids = Extractor(model, sites), torch.zeros(8, 256, dtype=torch.long)
    extract(ids[:1])  # what is made once
    with Peak() as peak:
        kept = [harvested(values) for values in extract(ids).values()]
    assert kept[0].shape == (8 * 255, 576)
    estimate = ids.numel() * activation_elements(*on_meta("SmolLM2-135M")) * 4
    assert estimate / 2 < peak.most <= estimate


class _Reached(Exception):
    pass


def measured(name: str, rows: int, ctx_len: int) -> int:
    """The peak of a forward in bfloat16, of shapes alone, with what it hands over."""
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.bfloat16).eval()
        layers: nn.ModuleList = model.transformer.h if name == "GPT-2" else model.model.layers
        taken: list[Tensor] = []

        def reach(_module: nn.Module, _args: Any, out: Any) -> None:
            taken.append(out if isinstance(out, Tensor) else out[0])
            raise _Reached

        layers[1].register_forward_hook(reach)
        ids = torch.zeros(rows, ctx_len, dtype=torch.long)
        with Peak() as peak, torch.no_grad():
            with pytest.raises(_Reached):
                model(input_ids=ids, use_cache=False)
            taken.append(harvested(taken[0]))
        return peak.most


# GPT-2's activation function, written out in Python, holds several copies of the widest matrix's output.
MOST_OF_ESTIMATE = {"GPT-2": 1.85}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "tiny"])
def test_the_chosen_rows_take_what_is_estimated_and_no_more_than_the_budget(name):
    ctx_len = 512
    rows = chosen(name, BF16, ctx_len, PLENTY, "cuda")
    peak = measured(name, rows, ctx_len)
    estimate = rows * ctx_len * activation_elements(*on_meta(name)) * DTYPE_BYTES["bfloat16"]
    assert peak <= 2 * GIB
    assert 0.75 < peak / estimate <= MOST_OF_ESTIMATE.get(name, 1)
