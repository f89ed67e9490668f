"""What cards are made of: curves as pictures, names without paths, values without secrets."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from bigsae.hub.curves import learning_curves
from bigsae.hub.names import is_hub_name, shown
from bigsae.hub.secrets import REMOVED, without_secrets

SVG = "{http://www.w3.org/2000/svg}"


def row(step: int, hookpoint: str = "a", **values: Any) -> dict[str, Any]:
    return {"step": step, "tokens": 100 * step, "hookpoint": hookpoint, **values}


def points(line: ET.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.attrib["points"].split())]


def test_curves_stand_where_their_values_are():
    """One panel has 0 at its left edge; values fall from its top, on axes that are told."""
    rows = [row(step, fvu=fvu) for step, fvu in ((1, 1.0), (2, 0.6), (4, 0.2))]
    picture = ET.fromstring(learning_curves(["a"], rows) or "")
    (line,) = picture.iter(f"{SVG}polyline")
    (x0, y0), (x1, y1), (x2, y2) = points(line)
    assert x2 - x1 == pytest.approx(2 * (x1 - x0), abs=0.2)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2) and y0 < y1
    labels = {text.text: float(text.attrib["y"]) for text in picture.iter(f"{SVG}text")}
    assert labels["1"] == pytest.approx(y0 + 4, abs=0.2) and labels["0.2"] == pytest.approx(y2 + 4, abs=0.2)
    assert {"FVU", "400", "tokens", "a"} <= set(labels) and not {"loss", "L0"} & set(labels)


def test_values_of_many_sizes_are_on_a_logarithmic_axis():
    rows = [row(step, loss=10.0 ** (3 - step)) for step in range(1, 6)]
    picture = ET.fromstring(learning_curves(["a"], rows) or "")
    (line,) = picture.iter(f"{SVG}polyline")
    heights = [y for _, y in points(line)]
    steps = [after - before for before, after in itertools.pairwise(heights)]
    assert steps == pytest.approx([steps[0]] * 4, abs=0.2)
    assert {"100", "1", "0.01"} <= {text.text for text in picture.iter(f"{SVG}text")}


def test_saes_lie_over_each_other_with_heldout_points():
    names = ["a", "b/k_<4>"]
    rows = [row(step, fvu=1 / step, l0=5.0, loss=2 / step) for step in range(1, 2000)]
    rows += [row(step, "b", variant="k_<4>", fvu=2 / step, l0=4.0) for step in range(1, 20)]
    rows += [row(7, heldout_fvu=0.3), row(9, heldout_fvu=float("nan")), row(5, "elsewhere", fvu=9.0)]
    picture = ET.fromstring(learning_curves(names, rows) or "")
    lines = list(picture.iter(f"{SVG}polyline"))
    assert len(lines) == 5 and len({line.attrib["stroke"] for line in lines}) == 2
    assert all(len(points(line)) <= 300 for line in lines)
    assert len(list(picture.iter(f"{SVG}circle"))) == 1
    assert {"a", "b/k_<4>", "loss", "FVU", "L0"} <= {text.text for text in picture.iter(f"{SVG}text")}
    width, height = float(picture.attrib["width"]), float(picture.attrib["height"])
    assert all(0 <= x <= width and 0 <= y <= height for line in lines for x, y in points(line))


def test_many_saes_are_named_in_part():
    names = [f"layer.{i}" for i in range(30)]
    picture = learning_curves(names, [row(1, name, fvu=0.5) for name in names]) or ""
    assert picture.count("layer.") == 20 and "and 10 more" in picture


def test_without_values_there_is_no_picture():
    assert learning_curves(["a"], []) is None
    assert learning_curves(["a"], [row(1, "b", fvu=0.5), {"step": 1, "hookpoint": "a", "fvu": 0.5}]) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("some/model", "`some/model`"),
        ("gpt2", "`gpt2`"),
        ("/home/me/models/x", "`x` (a local folder)"),
        ("/home/me/models/x/", "`x` (a local folder)"),
        ("~/text/part.jsonl.gz", "`part.jsonl.gz` (a local file)"),
        ("../me/x", "`x` (a local folder)"),
        ("me/texts/all.parquet", "`all.parquet` (a local file)"),
        ("corpus.jsonl", "`corpus.jsonl` (a local file)"),
        ("C:\\Users\\me\\x", "`x` (a local folder)"),
        ("", "an unnamed source"),
    ],
)
def test_names_without_paths(name, expected):
    assert shown(name) == expected
    assert is_hub_name(name) == (expected == f"`{name}`")


def test_what_lies_here_is_not_the_hubs(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "model").mkdir(parents=True)
    (tmp_path / "some" / "text").touch()
    assert shown("some/model") == "`model` (a local folder)" and shown("some/text") == "`text` (a local file)"


PASSWORDS = {
    "plain": "http://me:geheim@proxy:3128",
    "a user alone": "https://geheim@host/path",
    "with signs": "socks5h://me:geheim#@?x@proxy",
    "in text": "it is at http://me:geheim@proxy, or not",
    "in JSON": json.dumps({"proxies": {"https": "http://me:geheim@proxy"}}),
    "quotes in JSON": json.dumps({"https": 'http://me:"geheim@proxy'}),
    "slashes in JSON": r'{"https": "http:\/\/me:geheim@proxy"}',
    "two": "http://a:geheim@one http://b:geheim@two",
}


@pytest.mark.parametrize("kind", PASSWORDS)
def test_no_password_of_a_url_is_left(kind):
    value = PASSWORDS[kind]
    nested = without_secrets({"lm": [{"kwargs": (value, 3)}, None], value: True})
    assert "geheim" not in json.dumps(nested) and "me:" not in json.dumps(nested)
    cleaned = nested["lm"][0]["kwargs"][0]
    assert REMOVED in cleaned and nested["lm"][0]["kwargs"][1] == 3 and nested["lm"][1] is None
    if "{" in value:
        assert json.loads(cleaned)


@pytest.mark.parametrize(
    "value",
    [
        "https://huggingface.co/user/name@main", "hf://datasets/user/name@v1/x.parquet", "me@example.org",
        '{"https": "http://proxy:3128", "mail": "me@example.org"}', "file:///data/x@y", "a:b@c",
        "data/hf_fineweb_sample",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(value):
    assert without_secrets(value) == value
