"""metrics.jsonl as curves and as the last numbers of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bigsae.hub.curves import is_number, thin
from bigsae.reporting.runs import SAEFolder

_MOST_POINTS = 500
# What a row has beside measurements, and what is shown elsewhere.
_NOT_CURVES = {"step", "tokens", "hookpoint", "variant", "lm_time_share", "sae_time_share", "heldout_tokens"}

Row = dict[str, Any]


def curves(rows: Sequence[Row]) -> dict[str, dict[str, list[float]]]:
    """Each metric of `rows` over tokens: {"x": tokens, "y": values}. Those that are always zero are left out, but
    for the share of dead latents."""
    names = dict.fromkeys(name for row in rows for name in row if name not in _NOT_CURVES)
    points = {
        name: [(row["tokens"], row[name]) for row in rows if is_number(row.get(name))] for name in names
    }
    thinned = {
        name: [(x, _short(y)) for x, y in thin(values, _MOST_POINTS)]
        for name, values in points.items()
        if name == "dead_fraction" or any(y for _, y in values)
    }
    return {
        name: {"x": [x for x, _ in values], "y": [y for _, y in values]} for name, values in thinned.items()
    }


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def last_values(rows: Sequence[Row]) -> dict[str, float]:
    """The newest value of each metric, and how many tokens are trained."""
    values: dict[str, float] = {}
    for row in rows:
        values |= {name: value for name, value in row.items() if is_number(value)}
    return values


def time_spent(sae: SAEFolder) -> dict[str, float] | None:
    """Seconds that the logged steps took, in the language model and in the SAEs, and tokens in a second of them.

    They are the same for every SAE of a run. None where nothing has been logged.
    """
    seconds = lm = 0.0
    before = 0
    for row in sae.rows:
        if not row.get("tokens_per_second"):
            continue
        took = (row["tokens"] - before) / row["tokens_per_second"]
        before = row["tokens"]
        seconds += took
        lm += took * row["lm_time_share"]
    if not seconds:
        return None
    return {"lm": lm, "sae": seconds - lm, "tokens_per_second": before / seconds}
