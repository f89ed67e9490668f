"""The language model over several ranks: what is read, what comes out, and what is left afterwards."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import transformers.modeling_utils
from safetensors import safe_open
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from bigsae.config import LMConfig
from bigsae.lm import compiling
from bigsae.lm.activations import Extractor
from bigsae.lm.hookpoints import activation_of, decoder_layers, locate, resolve_hookpoints
from bigsae.lm.loading import load_lm, local_bytes, meta_model, resolve_layout
from tests.distributed.ranks import run_ranks
from tests.lm.plain import plain_activations, plain_model
from tests.models import tiny_llama

CPU = torch.device("cpu")
NUM_LAYERS = 6
PATTERNS = [
    "model.layers.2", "model.layers.1.mlp", "model.layers.2.self_attn", "model.layers.1:input",
    "model.layers.1.mlp:input",
]  # fmt: skip
IN_ORDER = [
    "model.layers.1:input", "model.layers.1.mlp:input", "model.layers.1.mlp", "model.layers.2.self_attn",
    "model.layers.2",
]  # fmt: skip


@contextmanager
def asked_for() -> Iterator[list[str]]:
    """Names of the tensors that transformers reads from safetensors files."""
    names: list[str] = []

    class Recording:
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            self.file = safe_open(*arguments, **keywords)

        def __enter__(self) -> Recording:
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> Any:
            return self.file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_slice(self, name: str) -> Any:
            return RecordingSlice(self.file.get_slice(name), name)

        def get_tensor(self, name: str) -> torch.Tensor:
            names.append(name)
            return self.file.get_tensor(name)

    class RecordingSlice:
        """A slice is opened for every tensor; only taking from it reads."""

        def __init__(self, opened: Any, name: str) -> None:
            self.opened, self.name = opened, name

        def __getitem__(self, index: Any) -> torch.Tensor:
            names.append(self.name)
            return self.opened[index]

        def __getattr__(self, name: str) -> Any:
            return getattr(self.opened, name)

    with mock.patch.object(transformers.modeling_utils, "safe_open", Recording):
        yield names


def tokens(rank: int) -> torch.Tensor:
    """Different rows for each rank."""
    return torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(rank))


def gathered(model: PreTrainedModel) -> list[str]:
    """Parameters that FSDP holds whole, from all ranks."""
    return [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]


def live_bytes() -> int:
    """Bytes of all tensors that are reachable in this process."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def check_equal(folder: str, model: PreTrainedModel, sites: tuple, ids: torch.Tensor) -> None:
    expected, _ = plain_activations(plain_model(Path(folder)), ids, [site.name for site in sites])
    extract = Extractor(model, sites)
    for _ in range(2):
        found = extract(ids)
        assert list(found) == [site.name for site in sites]
        for name, activation in found.items():
            assert torch.equal(activation, expected[name]), name


def on_two_ranks(folder: str, moe: str) -> dict[str, Any]:
    # As accelerate sets them by default under FSDP.
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    lm = LMConfig(dtype="float32")
    layout = resolve_layout(lm, 2, 2)
    assert layout.kind == "fsdp"
    meta, _ = meta_model(folder, lm)
    sites = locate(meta, resolve_hookpoints(PATTERNS, meta))
    assert [site.name for site in sites] == IN_ORDER
    with asked_for() as names:
        model = load_lm(folder, lm, meta, layout, CPU, sites)
    result = {
        "names": names,
        "local": sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor)),
        "total": sum(p.numel() for p in model.parameters()),
        "bytes": local_bytes(model),
        "layers": len(decoder_layers(model)[1]),
    }
    check_equal(folder, model, sites, tokens(dist.get_rank()))
    assert gathered(model) == []

    replicated = load_lm(folder, lm, meta, resolve_layout(LMConfig(shard_size=1), 2, 2), CPU, sites)
    check_equal(folder, replicated, sites, tokens(dist.get_rank()))

    moe_meta, _ = meta_model(moe, lm)
    moe_sites = locate(moe_meta, resolve_hookpoints(["model.layers.1", "model.layers.0.mlp"], moe_meta))
    check_equal(
        moe, load_lm(moe, lm, moe_meta, layout, CPU, moe_sites), moe_sites, tokens(dist.get_rank()) % 90
    )
    check_a_hundred_stops(folder, meta)
    return result


def check_a_hundred_stops(folder: str, meta: PreTrainedModel) -> None:
    """Stop a hundred traces of the whole sharded model, then splice."""
    lm = LMConfig(dtype="float32")
    model = load_lm(folder, lm, meta, resolve_layout(lm, 2, 2), CPU, all_layers=True)
    sites = locate(meta, resolve_hookpoints(["model.layers.2", "model.layers.4"], meta))
    extract = Extractor(model, sites)
    ids = tokens(dist.get_rank())
    plain = plain_model(Path(folder))
    expected, logits = plain_activations(plain, ids, [site.name for site in sites])
    for _ in range(10):
        extract(ids)
    before = live_bytes()
    for number in range(100):
        extract(tokens(number))
        assert gathered(model) == [], number
    assert live_bytes() == before, "memory is flat"
    for name, activation in extract(ids).items():
        assert torch.equal(activation, expected[name]), name
    assert torch.equal(extract.splice(ids, {site.name: lambda x: x.clone() for site in sites}), logits)
    zeroed = extract.splice(ids, {"model.layers.4": lambda x: x * 0})
    plain.get_submodule("model.layers.4").register_forward_hook(
        lambda _, __, out: torch.zeros_like(activation_of(out))
    )
    assert torch.equal(zeroed, plain(input_ids=ids).logits)
    assert gathered(model) == []
    assert torch.equal(extract(ids)["model.layers.4"], expected["model.layers.4"])


def on_two_ranks_with_flags(folder: str) -> list[int]:
    """Under autocast, then compiled as well, ranks with different numbers of rows; the graphs so far after each."""
    compiling._OPTIONS["backend"] = "aot_eager"  # what is captured, run as it is: exact, and in seconds
    rank = dist.get_rank()
    plain = plain_model(Path(folder))
    num_graphs = []
    for shard_size, compiled in ((1, False), (2, False), (2, True)):
        lm = LMConfig(dtype="float32", shard_size=shard_size, autocast=True, compile=compiled)
        meta, _ = meta_model(folder, lm)
        sites = locate(meta, resolve_hookpoints(PATTERNS, meta))
        model = load_lm(folder, lm, meta, resolve_layout(lm, 2, 2), CPU, sites, all_layers=True)
        extract = Extractor(model, sites)
        for rows in ((3, 1, 2), (2, 3, 1))[rank]:
            ids = tokens(rank + rows)[:1].repeat(rows, 1)
            with torch.autocast("cpu", torch.bfloat16):
                expected, logits = plain_activations(plain, ids, IN_ORDER)
            for name, activation in extract(ids).items():
                assert activation.dtype == expected[name].dtype
                assert torch.equal(activation, expected[name]), name
            assert torch.equal(extract.splice(ids, {}), logits)
            assert shard_size == 1 or gathered(model) == []
        num_graphs.append(counters["stats"]["unique_graphs"])
    return num_graphs


def on_four_ranks(folder: str) -> str:
    lm = LMConfig(dtype="float32", shard_size=2)
    meta, _ = meta_model(folder, lm)
    sites = locate(meta, resolve_hookpoints(PATTERNS, meta))
    layout = resolve_layout(lm, 4, 4)
    model = load_lm(folder, lm, meta, layout, CPU, sites)
    check_equal(folder, model, sites, tokens(dist.get_rank()))
    weight = model.get_submodule("model.layers.0.mlp.up_proj").weight
    assert isinstance(weight, DTensor)
    return f"{layout.kind} {tuple(weight.device_mesh.shape)} {tuple(weight.to_local().shape)}"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("llama"), num_layers=NUM_LAYERS))


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("moe")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=90, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.2, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def test_two_ranks_share_one_copy_of_the_needed_layers(llama: str, moe: str) -> None:
    results = run_ranks(2, on_two_ranks, llama, moe)
    whole = plain_model(Path(llama))
    dropped = tuple(f"model.layers.{i}." for i in range(3, NUM_LAYERS))
    needed = {n: p.numel() for n, p in whole.named_parameters() if not n.startswith(dropped)}
    for result in results:
        assert result["layers"] == 3
        assert set(result["names"]) == set(needed), "read just the layers up to the hookpoint"
        assert result["total"] == sum(needed.values())
        assert result["local"] < 0.6 * sum(needed.values())
        assert result["bytes"] < 4 * result["local"] + 1024
    assert sum(result["local"] for result in results) == sum(needed.values())


def test_flags_of_the_forward_on_two_ranks(llama: str) -> None:
    # The compiler's trial; the layers with one row, and with several.
    assert run_ranks(2, on_two_ranks_with_flags, llama) == [[0, 0, 3]] * 2


def test_four_ranks_hold_two_copies(llama: str) -> None:
    assert run_ranks(4, on_four_ranks, llama) == ["hsdp (2, 2) (32, 32)"] * 4
