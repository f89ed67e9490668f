"""Measured points and a model's line on logarithmic axes, as SVG text: no plotting library is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 260, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 14, 40


@dataclass(frozen=True)
class Panel:
    """One pair of axes; all values are > 0."""

    x_label: str
    y_label: str
    x: Sequence[float]
    measured: Sequence[float]
    model: Sequence[float]


def svg(panels: Sequence[Panel], columns: int = 3) -> str:
    """The panels in rows of `columns`, with a legend below."""
    rows = -(-len(panels) // columns)
    width, height = columns * _WIDTH, rows * _HEIGHT + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i, panel in enumerate(panels):
        parts.append(f'<g transform="translate({i % columns * _WIDTH},{i // columns * _HEIGHT})">')
        parts += [*_axes(panel), *_data(panel), "</g>"]
    y = height - 10
    parts.append(f'<circle cx="60" cy="{y - 4}" r="3.5" fill="#1b6ca8"/><text x="70" y="{y}">measured</text>')
    parts.append(
        f'<path d="M150,{y - 4} h24" stroke="#c0392b" fill="none"/><text x="180" y="{y}">model</text>'
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Base-2 logarithms of the ends of an axis, a little beyond the values."""
    return math.log2(min(values)) - 0.3, math.log2(max(values)) + 0.3


def _place(value: float, ends: tuple[float, float], first: float, last: float) -> float:
    return round(first + (math.log2(value) - ends[0]) / (ends[1] - ends[0]) * (last - first), 1)


def _places(panel: Panel, values: Sequence[float]) -> list[tuple[float, float]]:
    xs, ys = _range(panel.x), _range([*panel.measured, *panel.model])
    return [
        (_place(x, xs, _LEFT, _WIDTH - _RIGHT), _place(y, ys, _HEIGHT - _BOTTOM, _TOP))
        for x, y in zip(panel.x, values, strict=True)
    ]


def _data(panel: Panel) -> list[str]:
    line = " L".join(f"{x},{y}" for x, y in _places(panel, panel.model))
    dots = [f'<circle cx="{x}" cy="{y}" r="3.5" fill="#1b6ca8"/>' for x, y in _places(panel, panel.measured)]
    return [f'<path d="M{line}" stroke="#c0392b" fill="none"/>', *dots]


def _axes(panel: Panel) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [f'<path d="M{_LEFT},{_TOP} V{bottom} H{right}" stroke="#444" fill="none"/>']
    ends = _range([*panel.measured, *panel.model])
    for power in range(math.ceil(ends[0]), math.floor(ends[1]) + 1, max(1, round((ends[1] - ends[0]) / 5))):
        y = _place(2.0**power, ends, bottom, _TOP)
        parts.append(f'<path d="M{_LEFT},{y} H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 4}" text-anchor="end">{_short(2.0**power)}</text>')
    for (x, _), value in zip(_places(panel, panel.measured), panel.x, strict=True):
        parts.append(f'<text x="{x}" y="{bottom + 14}" text-anchor="middle">{_short(value)}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{bottom + 30}" text-anchor="middle">{panel.x_label}</text>')
    return [*parts, f'<text x="{_LEFT}" y="{_TOP - 4}" text-anchor="middle">{panel.y_label}</text>']


def _short(value: float) -> str:
    """4096 as 4k."""
    for unit, letter in ((2**20, "M"), (2**10, "k")):
        if value >= unit and value % unit == 0:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"
