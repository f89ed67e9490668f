"""Learning curves as a picture that a card can show: SVG, by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Points = list[tuple[float, float]]

# What is drawn, and measurements on held-out documents that stand beside it.
_PANELS = {"loss": ("loss", None), "fvu": ("FVU", "heldout_fvu"), "l0": ("L0", "heldout_l0")}
_COLOURS = (
    "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22",
)  # fmt: skip
_MOST_POINTS = 300
_MOST_NAMED = 20
_LONGEST_NAME = 58
# A ratio beyond which the small values of a curve would lie on the axis.
_LOGARITHMIC_FROM = 30
_WIDTH, _HEIGHT = 300, 200
_LEFT, _TOP, _GAP, _BELOW, _LINE = 56, 28, 60, 50, 20


def merged_rows(name: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What metrics.jsonl's `rows` say of the SAE `name`, one row for a step, in their order."""
    by_step: dict[int, dict[str, Any]] = {}
    for row in rows:
        if name_of(row) == name:
            by_step.setdefault(row["step"], {}).update(row)
    return [values for _, values in sorted(by_step.items())]


def name_of(row: Mapping[str, Any]) -> str:
    """The folder of the SAE that a row of metrics.jsonl is of."""
    return f"{row['hookpoint']}/{row['variant']}" if row.get("variant") else str(row.get("hookpoint"))


def learning_curves(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Loss, FVU and L0 of the SAEs `names` over tokens, as SVG; None where `rows` (of metrics.jsonl) tell of none."""
    of = {name: merged_rows(name, rows) for name in names}
    panels, any_dots = [], False
    for key, (title, heldout) in _PANELS.items():
        lines = [thin(_points(of[name], key)) for name in names]
        dots = [_points(of[name], heldout) if heldout else [] for name in names]
        if any(lines):
            panels.append(_panel(len(panels), title, lines, dots))
            any_dots |= any(dots)
    if not panels:
        return None
    drawn = [name for name in names if any(_points(of[name], key) for key in _PANELS)]
    legend, height = _legend(drawn, {name: _colour(i) for i, name in enumerate(names)}, any_dots)
    width = _LEFT + 3 * (_WIDTH + _GAP)
    box = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="sans-serif" font-size="13" fill="#333">',
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            *panels,
            *legend,
            "</svg>\n",
        ]
    )


def _colour(i: int) -> str:
    return _COLOURS[i % len(_COLOURS)]


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> Points:
    return [
        (row["tokens"], row[key]) for row in rows if is_number(row.get("tokens")) and is_number(row.get(key))
    ]


def is_number(value: Any) -> bool:
    """Whether `value` can be a point of a curve."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def thin(points: Points, most: int = _MOST_POINTS) -> Points:
    """At most `most`: the means of as many equal stretches."""
    if len(points) <= most:
        return points
    edges = [len(points) * i // most for i in range(most + 1)]
    stretches = [points[a:b] for a, b in itertools.pairwise(edges)]
    return [(sum(x for x, _ in s) / len(s), sum(y for _, y in s) / len(s)) for s in stretches]


def _panel(number: int, title: str, lines: Sequence[Points], dots: Sequence[Points]) -> str:
    shown = list(itertools.chain(*lines, *dots))
    last = max(x for x, _ in shown) or 1
    low, high = min(y for _, y in shown), max(y for _, y in shown)
    logarithmic = low > 0 and high / low > _LOGARITHMIC_FROM
    ticks, (low, high) = _decades(low, high) if logarithmic else _ticks(low, high)
    left = _LEFT + number * (_WIDTH + _GAP)

    def at(x: float, y: float) -> tuple[float, float]:
        y = math.log10(y) if logarithmic else y
        return left + _WIDTH * x / last, _TOP + _HEIGHT * (high - y) / (high - low)

    parts = [f'<text x="{left}" y="{_TOP - 10}" font-weight="bold">{title}</text>']
    for tick in ticks:
        y = at(0, tick)[1]
        parts.append(f'<path d="M{left} {y:.1f}h{_WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        x, y = left + share * _WIDTH, _TOP + _HEIGHT + 18
        parts.append(f'<text x="{x:g}" y="{y}" text-anchor="{anchor}">{_short(share * last)}</text>')
    parts.append(
        f'<text x="{left + _WIDTH / 2:g}" y="{_TOP + _HEIGHT + 36}" text-anchor="middle">tokens</text>'
    )
    for i, points in enumerate(lines):
        if points:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
            parts.append(f'<polyline points="{path}" fill="none" stroke="{_colour(i)}" stroke-width="1.5"/>')
    for i, points in enumerate(dots):
        for x, y in (at(*point) for point in thin(points)):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{_colour(i)}"/>')
    return "\n".join(parts)


def _ticks(low: float, high: float) -> tuple[list[float], tuple[float, float]]:
    """Round values from `low` to `high`, and the ends of the axis."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    raw = (high - low) / 4
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, last + 1)], (first * step, last * step)


def _decades(low: float, high: float) -> tuple[list[float], tuple[float, float]]:
    """Powers of ten from `low` to `high`, and the ends of the axis, as exponents."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = max(1, math.ceil((last - first) / 5))
    return [10.0**i for i in range(first, last + 1, step)], (first, last)


def _legend(names: Sequence[str], colours: Mapping[str, str], any_dots: bool) -> tuple[list[str], int]:
    """Names below the panels, in two columns, and the height of the picture."""
    top = _TOP + _HEIGHT + _BELOW + 20
    parts = []
    for i, name in enumerate(names[:_MOST_NAMED]):
        x, y = _LEFT + (i % 2) * (3 * (_WIDTH + _GAP) // 2), top + i // 2 * _LINE
        short = name if len(name) <= _LONGEST_NAME else "…" + name[1 - _LONGEST_NAME :]
        parts.append(f'<path d="M{x} {y - 4}h20" stroke="{colours[name]}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 28}" y="{y}">{escape(short)}</text>')
    bottom = top + math.ceil(min(len(names), _MOST_NAMED) / 2) * _LINE
    notes = [f"and {len(names) - _MOST_NAMED} more"] if len(names) > _MOST_NAMED else []
    notes += ["points: on held-out documents"] if any_dots else []
    parts.append(f'<text x="{_LEFT}" y="{bottom}">{"; ".join(notes)}</text>')
    return parts, bottom + _LINE


def _short(tokens: float) -> str:
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if tokens >= unit:
            return f"{tokens / unit:.3g}{letter}"
    return f"{tokens:.3g}"
