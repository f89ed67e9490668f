"""Results as a table."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

# The rows of the table: a caption, the metric, its format.
_ROWS = (
    ("cross-entropy, clean", "ce_clean", ".4f"),
    ("cross-entropy, spliced", "ce_spliced", ".4f"),
    ("cross-entropy, zero-ablated", "ce_zero", ".4f"),
    ("cross-entropy, mean-ablated", "ce_mean", ".4f"),
    ("loss recovered, of zero ablation", "loss_recovered", ".4f"),
    ("loss recovered, of mean ablation", "loss_recovered_mean", ".4f"),
    ("KL, spliced", "kl_spliced", ".4f"),
    ("KL, zero-ablated", "kl_zero", ".4f"),
    ("KL, mean-ablated", "kl_mean", ".4f"),
    ("FVU", "fvu", ".4f"),
    ("explained variance", "explained_variance", ".4f"),
    ("cosine", "cosine", ".4f"),
    ("norm ratio", "norm_ratio", ".4f"),
    ("L0", "l0", ",.1f"),
    ("L1", "l1", ",.1f"),
    ("latents", "d_sae", ",d"),
    ("dead latents", "dead_latents", ",d"),
    ("dense latents", "dense_latents", ",d"),
)
_BARS = " ▁▂▃▄▅▆▇█"


def as_table(results: dict[str, Any]) -> RenderableType:
    """What `evaluate_saes` returned, to read: a column for each SAE, and one for all of them spliced."""
    columns = dict(results["saes"])
    if results["joint"] is not None:
        columns["all spliced"] = results["joint"]
    left_out = ", ".join(results["left_out"]) or "nothing"
    table = Table()
    table.add_column()
    for name in columns:
        table.add_column(Text(name), justify="right")
    for caption, metric, style in _ROWS:
        if any(metric in values for values in columns.values()):
            table.add_row(
                caption, *(format(v[metric], style) if metric in v else "" for v in columns.values())
            )
    low, high = (results["saes"][next(iter(columns))]["density_histogram"]["log10_edges"][i] for i in (0, -1))
    bars = [_bars(v["density_histogram"]) if "density_histogram" in v else "" for v in columns.values()]
    table.add_row(f"latents by log10 density, {low:g} to {high:g}", *bars)
    title = f"{results['model']} on {results['tokens']:,} tokens of {results['dataset']}"
    return Group(
        Text(title), table, Text(f"neither spliced nor counted: {left_out}; ablated {results['ablated']}")
    )


def _bars(histogram: dict[str, Any]) -> str:
    most = max(*histogram["num_latents"], 1)
    # Any latent at all is seen.
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // most)] for count in histogram["num_latents"])
