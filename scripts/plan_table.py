"""The table of docs/plan.md: Llama-3-70B's shapes, two widths, three numbers of GPUs.

python scripts/plan_table.py            prints it
python scripts/plan_table.py --write    puts it into docs/plan.md
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from bigsae.config import SAEConfig
from bigsae.planning.model import LMFacts, lm_facts, with_chosen_rows
from bigsae.planning.options import PlanConfig
from bigsae.planning.recommend import check_plan, recommend
from bigsae.planning.report import as_numbers

PAGE = Path(__file__).parent.parent / "docs" / "plan.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
WIDTHS = (131_072, 1_048_576)
# GPUs and the batch over all of them.
SIZES = ((8, 16_384), (64, 65_536), (512, 262_144))
HEAD = (
    "d_sae", "encoder", "GPUs", "batch", "LM copies x ranks", "data x latent", "GiB a GPU", "GB a step: NVLink",
    "network", "ms: LM", "SAE", "tokens/s", "with dead latents", "hours for 10⁹ tokens", "binds",
)  # fmt: skip


def llama_70b(folder: str) -> None:
    """Llama-3-70B's config.json, alone, in `folder`."""
    LlamaConfig(
        hidden_size=8192,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=28672,
        vocab_size=128256,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)


def table() -> str:
    """The table, in Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        llama_70b(folder)
        config = PlanConfig(model=folder, hookpoints=("model.layers.40",), ctx_len=1024)
        facts = lm_facts(config)
        config = with_chosen_rows(config, facts)
        rows = [
            _row(
                replace(
                    config, gpus=gpus, batch_size_tokens=batch, sae=SAEConfig(d_sae=d_sae, autocast=autocast)
                ),
                facts,
            )
            for d_sae in WIDTHS
            for autocast in (False, True)
            for gpus, batch in SIZES
        ]
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(config: PlanConfig, facts: LMFacts) -> list[str]:
    check_plan(config)
    numbers = as_numbers(config, facts, recommend(config, facts), [])
    mesh, stages = numbers["mesh"], numbers["stages"]
    fits = "" if numbers["fits"] else " (too much)"
    return [
        f"{config.sae.d_sae:,}",
        "bfloat16" if config.sae.autocast else "float32",
        str(config.gpus),
        f"{config.batch_size_tokens:,}",
        f"{mesh['replicate_size']} x {mesh['shard_size']}",
        f"{mesh['data']} x {mesh['latent']}",
        f"{numbers['bytes_per_rank']['most at a time'] / 2**30:.1f}{fits}",
        _sum(stages, "nvlink_bytes_per_step", 1e-9),
        _sum(stages, "network_bytes_per_step", 1e-9),
        _sum([s for s in stages if s["name"] == "LM forward"], "seconds_per_step", 1e3),
        _sum([s for s in stages if s["name"] != "LM forward"], "seconds_per_step", 1e3),
        f"{numbers['tokens_per_second']:,.0f}",
        f"{numbers['tokens_per_second_with_dead_latents']:,.0f}",
        f"{numbers['hours']:.1f}",
        numbers["binds"],
    ]


def _sum(stages: list[dict[str, Any]], key: str, unit: float) -> str:
    return f"{unit * sum(stage[key] for stage in stages):,.1f}"


def main() -> None:
    """Print the table, or write it into the page."""
    made = table()
    if sys.argv[1:] != ["--write"]:
        print(made, end="")
        return
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    PAGE.write_text(before + BEGIN + made + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
