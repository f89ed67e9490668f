"""The command: what it says, of runs that fit and of runs that do not, and of mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig

import bigsae
from bigsae.commands import run_command
from bigsae.parallel.traffic import Payload
from bigsae.plan import main
from bigsae.planning.estimate import gpu_of
from bigsae.planning.model import lm_facts
from bigsae.planning.options import PlanConfig
from bigsae.planning.recommend import recommend, remedies
from bigsae.planning.stages import Mesh, group_size, lm_stage
from tests.launch import environment
from tests.models import tiny_llama
from tests.planning.plans import planned

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "scripts"))
from plan_table import llama_70b


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    llama_70b(str(folder / "llama-70b"))
    tiny_llama(folder / "tiny")
    return folder


@pytest.fixture
def config(home) -> PlanConfig:
    """A dictionary and a model neither of which fits a GPU."""
    return PlanConfig(
        lm=bigsae.LMConfig(micro_batch_rows=8),
        model=str(home / "llama-70b"),
        hookpoints=("model.layers.40",),
        gpus=64,
        sae=bigsae.SAEConfig(d_sae=2**20),
        batch_size_tokens=65_536,
        ctx_len=1024,
    )


@pytest.fixture
def run_plan(monkeypatch, capsys):
    """The command in this process: exit status, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bigsae.plan", *arguments])
        status = 0
        try:
            run_command(main)
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    return run


def flags(home: Path, model: str = "llama-70b", *more: str) -> list[str]:
    return ["--model", str(home / model), "--hookpoints", "model.layers.2", "--ctx-len", "1024", *more]


def test_a_plan_to_read(home, run_plan):
    status, out, err = run_plan(*flags(home, "llama-70b", "--sae.d-sae", "1048576", "--gpus", "64"))
    assert status == 0, err
    for word in (
        "language model, its shard", "layers gathered", "activations of the forward", "buffer", "SAE weights",
        "SAE moments", "SAE gradients", "SAE working copy", "SAE slab", "checkpoint on disk", "LM forward",
        "SAE encode", "SAE decode", "SAE gradients", "SAE optimiser", "NVLink", "network", "tokens/s", "hours for",
        "a forward: 8 rows of 1,024 tokens",
        "recommended: --lm.shard-size", "--mesh.latent 8", "because latent 8", "assumed:", "verdict: fits",
    ):  # fmt: skip
        assert word in out, word


def test_a_run_that_cannot_fit_is_no_error_and_says_what_would_help(home, run_plan):
    more = ("--sae.d-sae", "1048576", "--gpus", "4", "--optim.accumulation-steps", "2")
    status, out, err = run_plan(*flags(home, "llama-70b", *more))
    assert status == 0, err
    end = out.split("verdict: ")[1]
    assert end.startswith("does not fit")
    assert "--gpus 8" in end


def test_as_json_from_a_shell(home):
    command = [
        sys.executable,
        "-m",
        "bigsae.plan",
        *flags(home, "tiny", "--gpus", "2", "--sae.d-sae", "4096"),
    ]
    result = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, env=environment(), check=True
    )
    plan = json.loads(result.stdout)
    assert plan["fits"] is True
    assert plan["saes"] == [[32, 4096, 32]]
    assert plan["micro_batch_rows"] == 8  # as chosen for ctx-len 1024
    assert plan["tokens_per_second"] == pytest.approx(4096 / plan["seconds_per_step"])
    assert plan["seconds_per_step"] == pytest.approx(sum(s["seconds_per_step"] for s in plan["stages"]))
    # Of each of a token's 32 latents a row of W_dec, and what is written of the token.
    decode = next(stage for stage in plan["stages"] if stage["name"] == "SAE decode")
    assert decode["bytes_per_token"] == 32 * 32 * 4 + 4 * 32
    assert plan["hours"] == pytest.approx(1e9 / plan["tokens_per_second"] / 3600)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hookpoints", "model.layers.99"], "--hookpoints model.layers.99"),
        (["--gpus", "12"], "--gpus 12 makes no whole nodes"),
        (["--gpus", "0"], "--gpus 0 must be greater than 0"),
        (["--sae.k", "9999"], "--sae.k 9999 exceeds d_sae"),
        (["--gpus", "8", "--mesh.latent", "3"], "--mesh.latent 3 does not divide the 8 ranks"),
        (["--gpus", "3", "--mesh.latent", "3", "--batch-size-tokens", "3072"], "does not divide d_sae 512"),
        (["--gpus", "8", "--lm.shard-size", "3"], "--lm.shard-size"),
        (["--model", "/nowhere"], "--model /nowhere cannot be opened"),
    ],
)  # fmt: skip
def test_mistakes(home, run_plan, arguments, message):
    status, _, err = run_plan(*flags(home, "tiny"), *arguments)
    assert status == 2
    assert err.splitlines()[-1].startswith("error: "), err
    assert message in err


def test_the_70b_model_is_sharded_and_the_dictionary_spread(config):
    facts, plan = planned(config)
    assert facts.num_layers == 41
    assert plan.mesh.num_latent >= 8
    assert plan.mesh.shard_size > 1
    assert plan.fits
    # 41 layers, embedding and head: 8192 x (2 x 8192 + 2 x 1024 + 3 x 28672) each, and two norms; 2 x 128256 x 8192.
    layer = 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672) + 2 * 8192
    whole = 2 * (41 * layer + 2 * 128_256 * 8192 + 8192)
    assert facts.local_bytes(config.lm, 1) == pytest.approx(whole, rel=1e-6)
    assert facts.local_bytes(config.lm, 8) == pytest.approx(whole / 8, rel=1e-3)
    assert facts.unsharded_bytes(config.lm, 8, ahead=True) == 2 * (128_256 * 8192 + layer + 8192)


def test_each_remedy_makes_it_fit(config):
    config = replace(config, gpus=8, batch_size_tokens=16_384, sae=replace(config.sae, d_sae=2**21))
    facts, plan = planned(config)
    assert not plan.fits
    fixes = remedies(config, facts)
    assert fixes[-1] == "--gpus 16"
    assert recommend(replace(config, gpus=16), facts).fits
    for fix in fixes[:-1]:
        changed = config
        for flag, value in zip(fix.split()[::2], fix.split()[1::2], strict=True):
            changed = with_flag(changed, flag, value)
        assert recommend(changed, facts).fits, fix
    assert len(fixes) > 1


def with_flag(config: PlanConfig, flag: str, value: str) -> PlanConfig:
    part, name = flag.removeprefix("--").replace("-", "_").split(".")
    options = getattr(config, part)
    kind = type(getattr(options, name))
    return replace(config, **{part: replace(options, **{name: kind(value)})})


def test_what_saves_memory_saves_it_where_it_says(config):
    mesh, lm = bigsae.MeshConfig(latent=8), replace(config.lm, shard_size=4)
    config = replace(config, mesh=mesh, lm=lm)
    facts, plan = planned(config)
    (sae,) = plan.bytes.saes

    def bytes_with(**changes):
        return recommend(replace(config, **changes), facts).bytes

    assert bytes_with(buffer=bigsae.BufferConfig(tokens=2**17)).buffer < plan.bytes.buffer
    assert bytes_with(buffer=bigsae.BufferConfig(device="cpu")).peak == plan.bytes.peak - plan.bytes.buffer
    shared = bytes_with(mesh=bigsae.MeshConfig(latent=8, shard_optimizer=True))
    assert shared.saes[0].moments == pytest.approx(sae.moments / 8, rel=1e-3)
    small = bytes_with(optim=bigsae.OptimConfig(moments_dtype="int8"))
    assert small.saes[0].moments == pytest.approx(sae.moments * (1 + 4 / 256) / 4, rel=1e-3)
    assert bytes_with(sae=replace(config.sae, slab_mb=64)).saes[0].slab == 64 * 2**20 == sae.slab / 4


def test_distributed_saes_are_one_rank_s_each(config):
    sae = bigsae.SAEConfig(d_sae=2**14)
    config = replace(config, gpus=8, variants=20, sae=sae, mesh=bigsae.MeshConfig(distribute_saes=True))
    _, plan = planned(config)
    assert len(plan.bytes.saes) == 3  # of 20 over 8 ranks
    assert plan.bytes.saes[0].weights == 4 * (2 * 2**14 * 8192 + 2**14 + 8192)
    assert not any(stage.name == "SAE collectives" for stage in plan.stages)
    (buffer,) = [stage for stage in plan.stages if stage.name == "buffer"]
    assert buffer.nvlink == 65_536 / 8 * 8192 * 2 * 7  # to each of the seven others


def test_flops_of_a_forward_are_torch_s_count(home):
    """Torch counts attention for all pairs of tokens, the plan for half of them, and not the positions' angles."""
    ctx_len = 64
    config = PlanConfig(model=str(home / "tiny"), hookpoints=("model.layers.3",), ctx_len=ctx_len)
    facts = lm_facts(config)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(config.model), attn_implementation="eager"
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(input_ids=torch.zeros(2, ctx_len, dtype=torch.long))
    counts = counter.get_flop_counts()["Global"]
    assert counts.pop(torch.ops.aten.bmm) == pytest.approx(
        2 * 2 * ctx_len * facts.attention_width * 2 * ctx_len, rel=0.01
    )
    assert sum(counts.values()) == 2 * facts.matmul_weights * 2 * ctx_len


def test_of_a_mixture_the_experts_that_a_token_takes_count(tmp_path):
    shapes = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=2, vocab_size=128,
        architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    shapes.save_pretrained(tmp_path)
    facts = lm_facts(PlanConfig(model=str(tmp_path), hookpoints=("model.layers.0",)))
    attention = 32 * 32 * 2 + 32 * 16 * 2
    assert facts.matmul_weights == attention + 32 * 8 + 2 * 3 * 32 * 16  # projections, router, two experts


def test_traffic_is_split_by_where_a_group_s_ranks_lie(config):
    """8 x 8 ranks, latent 8: latents' groups are nodes, those of data have one rank on each."""
    mesh = Mesh(num_ranks=64, num_local=8, shard_size=8, num_latent=8)
    assert group_size(Payload("x", "all_gather", "latent", 1), mesh) == (8, 8)
    assert group_size(Payload("x", "all_reduce", "data", 1), mesh) == (8, 1)
    assert group_size(Payload("x", "all_reduce", "data", 1), replace(mesh, num_latent=2)) == (32, 4)
    assert group_size(Payload("x", "all_gather", "latent", 1), replace(mesh, num_latent=16)) == (16, 8)
    facts = lm_facts(config)
    assert lm_stage(config, facts, mesh).network == 0
    across = lm_stage(config, facts, replace(mesh, shard_size=64))
    assert across.network == pytest.approx(across.nvlink / 7)


def test_what_binds_is_what_most_of_the_time_waits_for(config):
    _, plan = planned(config)
    gpu = gpu_of(config)
    assert plan.binding(gpu) == "compute"
    slow = replace(gpu, network=gpu.network / 100)
    assert plan.binding(slow) == "network"
