"""What keeps the page closed: nothing but its own script runs, and nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files

import pytest

from bigsae.reporting.page import embedded_json, page
from tests.reporting.conftest import EVIL_TEXT, EVIL_TOKEN

ASSETS = sorted((files("bigsae.reporting") / "assets").iterdir(), key=lambda asset: asset.name)


@pytest.mark.parametrize(
    "text", [EVIL_TEXT, EVIL_TOKEN, "<!--<script>", "]]>", "\u2028", "&lt;", "{policy}", "é'\"\\"]
)
def test_text_stays_text(text):
    embedded = embedded_json({"text": text})
    assert not re.search("[<>&\u2028]", embedded)
    assert json.loads(embedded) == {"text": text}


def test_half_a_character_can_be_written():
    assert json.loads(embedded_json(["\ud83d"])) == ["?"]


def test_numbers_that_are_none_are_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        embedded_json(float("nan"))


def test_only_what_was_hashed_runs():
    made = page({"texts": [EVIL_TEXT]})
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', made)
    assert policy
    assert "default-src 'none'" in policy[1] and "unsafe" not in policy[1] and "http" not in policy[1]
    scripts = re.findall(r"<script>(.*?)</script>", made, re.S)
    styles = re.findall(r"<style>(.*?)</style>", made, re.S)
    assert len(scripts) == len(styles) == 1
    for kind, text in (("script", scripts[0]), ("style", styles[0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy[1]
    assert made.count("<script") == 2


@pytest.mark.parametrize("asset", ASSETS, ids=lambda asset: asset.name)
def test_assets_make_no_markup_of_texts_and_fetch_nothing(asset):
    text = asset.read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text)
    assert not re.search(r"fetch\(|XMLHttpRequest|@import|url\(|import\(", text)
    addresses = set(re.findall(r"https?://[^'\"\s]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert len(text.splitlines()) < 400
