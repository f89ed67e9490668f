"""The table of scripts/quality.py from its lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# A ratio of FVUs beyond which bigsae counts as worse.
_WORSE = 1.02
# L0s that differ by a larger part have FVUs that do not compare.
_NEAR = 0.1

_NOTES = """\
## What each trainer does of its own

- **Start.** Both scale activations to a mean norm of sqrt(d_in), from the same first tokens, and start the encoder as
  the decoder's transpose; bigsae scales it so that the first reconstructions fit (topk, batchtopk, matryoshka,
  jumprelu). bigsae starts b_dec at the geometric median, in standard at zero as SAELens does.
- **Decoder.** bigsae keeps the rows of topk, batchtopk and matryoshka at norm 1 and trains them at 3 times the learning
  rate, which turns them about as fast as free ones that start shorter; it leaves those of jumprelu and gated
  (from norm 0.3; gated's at 3 times the rate) and standard (0.1) free. SAELens leaves all free, from 0.1.
- **topk, batchtopk, matryoshka.** SAELens weighs latents by their rows' norms when it chooses the largest. Its AuxK has
  the weight 1 beside a squared error, bigsae's 1/32 beside a part of the variance, as in the paper. bigsae averages the
  prefixes' losses of matryoshka, SAELens adds them.
- **Threshold of batchtopk, matryoshka.** Both export the running mean of the smallest value kept; SAELens's still
  carries its start at zero, bigsae's does not. "FVU at target" has the threshold moved to where held-out tokens have
  the target's L0, so that a difference of thresholds is not taken for one of dictionaries.
- **jumprelu.** SAELens weighs the square of each token's distance from the target L0, bigsae by default that of the
  batch's mean. bigsae starts all thresholds where the first tokens have the target's L0 and moves them at a rate of
  their own; SAELens starts them at 0.01 and moves them at the weights' rate.
- **gated.** bigsae resamples dead latents (`--sae.resample-every-tokens`), which SAELens does not offer.
- **gated, standard.** The same losses and coefficients. Of several coefficients, "FVU at target" is interpolated: log
  FVU linearly in log L0, between the neighbours of the target, or from the nearest two where all lie on one side (~).
"""


def table(lines: Sequence[dict[str, Any]], command: str) -> str:
    """Markdown from the finished runs `lines`."""
    if not lines:
        return "# Quality\n\nNothing has been trained yet.\n"
    tasks = {line["run"][0]["name"]: line["run"][0] for line in lines}
    parts = ["# Quality of bigsae's SAEs beside SAELens's\n", _circumstances(lines, command)]
    worse: list[str] = []
    for name, task in tasks.items():
        of_task = [line for line in lines if line["run"][0] == task]
        parts.append(f"## {name}\n\n{_conditions(task, of_task)}\n\n{_rows(task, of_task, worse)}")
    parts.append("## Where bigsae is worse\n\n" + ("\n".join(worse) or "Nowhere by these measures.") + "\n")
    return "\n".join([*parts, _NOTES])


def _circumstances(lines: Sequence[dict[str, Any]], command: str) -> str:
    machines = sorted(
        {f"{m['cpu']}, {m['num_threads']} threads" for m in (line["machine"] for line in lines)}
    )
    versions = sorted(
        {", ".join(f"{name} {number}" for name, number in line["versions"].items()) for line in lines}
    )
    commits = sorted({line["commit"] for line in lines})
    return (
        f"Made by `{command}` on {' and '.join(machines)}; {'; '.join(versions)}; commit {', '.join(commits)}.\n\n"
        "Means over seeds, ± half the range where there are several. FVU: the squared error's part of the variance. "
        "MMCS: mean over true features of the largest cosine with a decoder row. dead: latents that never fire on the "
        "held-out tokens. All of exported SAEs, as SAELens loads them. Ratio: FVU of bigsae / FVU of SAELens, at the "
        "target's L0 where that is known; in brackets where the trainers' L0 differ by more than 10 %: such FVUs do "
        "not compare.\n"
    )


def _conditions(task: dict[str, Any], lines: Sequence[dict[str, Any]]) -> str:
    seeds = sorted({line["run"][3] for line in lines})
    return (
        f"d_in {task['d_in']}, d_sae {task['d_sae']}, {task['num_steps']} steps of {task['batch_size']}, learning rate "
        f"{task['lr']:g}, k or target L0 {task['target']}, dead after {task['dead_steps']} steps, "
        f"seeds {', '.join(map(str, seeds))}."
    )


def _rows(task: dict[str, Any], lines: Sequence[dict[str, Any]], worse: list[str]) -> str:
    mmcs = any("mmcs" in line["scores"] for line in lines)
    head = [
        "architecture",
        "trainer",
        *(["MMCS"] if mmcs else []),
        "L0",
        "FVU",
        "FVU at target",
        "ratio",
        "dead",
        "s",
    ]
    rows = [head, ["---"] * len(head)]
    for architecture in dict.fromkeys(line["run"][1] for line in lines):
        groups = {
            trainer: _summary(task, [line for line in lines if line["run"][1:3] == [architecture, trainer]])
            for trainer in ("bigsae", "sae-lens")
        }
        ours, theirs = groups.values()
        ratio = _ratio(task, ours, theirs)
        for trainer, summary in groups.items():
            if summary is None:
                continue
            cells = [architecture, trainer, *([_spread(summary["mmcs"])] if mmcs else [])]
            cells += [
                _sweep(summary["l0"], 1),
                _sweep(summary["fvu"], 4),
                summary["mark"] + _spread(summary["at"]),
            ]
            cells += [
                ratio if trainer == "bigsae" else "",
                _sweep(summary["dead"], 3),
                _sweep(summary["s"], 0),
            ]
            rows.append(cells)
        if ours and theirs:
            worse += _worse(task, architecture, ratio, ours, theirs)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _summary(task: dict[str, Any], lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Scores of one architecture and trainer: for each coefficient, or over seeds alone where one is enough."""
    if not lines:
        return None
    sweep: dict[float | None, list[dict[str, Any]]] = {}
    for line in lines:
        sweep.setdefault(line["run"][4].get("l1_coefficient"), []).append(line)
    summary: dict[str, Any] = {
        name: [[line["scores"][name] for line in group] for group in sweep.values()]
        for name in ("l0", "fvu", "dead")
    }
    summary["s"] = [[line["seconds"] for line in group] for group in sweep.values()]
    summary["mmcs"] = [line["scores"]["mmcs"] for line in lines if "mmcs" in line["scores"]]
    summary["at"], summary["mark"] = [], ""
    if len(sweep) > 1:
        for seed in sorted({line["run"][3] for line in lines}):
            points = [(g["scores"]["l0"], g["scores"]["fvu"]) for g in lines if g["run"][3] == seed]
            fvu, inside = interpolate(points, task["target"])
            summary["at"].append(fvu)
            summary["mark"] = summary["mark"] if inside else "~"
    elif "fvu_at_target" in lines[0]["scores"]:
        summary["at"] = [line["scores"]["fvu_at_target"] for line in lines]
    return summary


def interpolate(points: Sequence[tuple[float, float]], l0: float) -> tuple[float, bool]:
    """FVU at `l0` from `points` (L0, FVU), log FVU linear in log L0; and whether `l0` lies between two of them."""
    logs = sorted((math.log(x), math.log(y)) for x, y in points if x > 0)
    if len({x for x, _ in logs}) < 2:
        return math.nan, False
    at = math.log(l0)
    last = len(logs) - 2
    i = min(max(sum(x <= at for x, _ in logs) - 1, 0), last)
    (x0, y0), (x1, y1) = logs[i], logs[i + 1]
    return math.exp(y0 + (y1 - y0) * (at - x0) / (x1 - x0)), logs[0][0] <= at <= logs[-1][0]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _ratio(task: dict[str, Any], ours: dict[str, Any] | None, theirs: dict[str, Any] | None) -> str:
    if not ours or not theirs:
        return ""
    if ours["at"] and theirs["at"]:
        return f"{_mean(ours['at']) / _mean(theirs['at']):.3f}"
    ratio = f"{_mean(ours['fvu'][0]) / _mean(theirs['fvu'][0]):.3f}"
    a, b = _mean(ours["l0"][0]), _mean(theirs["l0"][0])
    return ratio if abs(a - b) <= _NEAR * max(a, b) else f"({ratio})"


def _worse(
    task: dict[str, Any], architecture: str, ratio: str, ours: dict[str, Any], theirs: dict[str, Any]
) -> list[str]:
    where, found = f"- {task['name']}, {architecture}:", []
    if not ratio.startswith("(") and float(ratio) > _WORSE:
        found.append(f"{where} FVU is {ratio} times SAELens's.")
    if ours["mmcs"] and _mean(ours["mmcs"]) < _mean(theirs["mmcs"]):
        found.append(f"{where} MMCS is {_mean(ours['mmcs']):.4f}, SAELens's {_mean(theirs['mmcs']):.4f}.")
    l0 = _mean(ours["l0"][0])
    if architecture == "jumprelu" and abs(l0 / task["target"] - 1) > _NEAR:
        found.append(f"{where} L0 is {l0:.1f} where {task['target']} was asked for.")
    return found


def _spread(values: Sequence[float], digits: int = 4) -> str:
    if not values:
        return ""
    half = (max(values) - min(values)) / 2
    return f"{_mean(values):.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def _sweep(groups: Sequence[Sequence[float]], digits: int) -> str:
    """One value, or those of the coefficients."""
    return ", ".join(_spread(group, digits) for group in groups)
