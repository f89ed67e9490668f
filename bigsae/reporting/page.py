"""The page: one file that needs nothing else, and in which nothing but its own script can run."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

_STYLES = ("page.css", "latents.css")
_SCRIPTS = ("tools.js", "charts.js", "overview.js", "latents.js", "main.js")


def page(content: dict[str, Any]) -> str:
    """The HTML that shows `content`, plain JSON values whose texts may be anything."""
    style = "".join(_asset(name) for name in _STYLES)
    script = "(() => {\n'use strict';\n" + "".join(_asset(name) for name in _SCRIPTS) + "})();\n"
    # Only what has these hashes is applied and run, and nothing is fetched: texts of a dataset can do no harm even if
    # one of them became markup.
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:"
    return _asset("page.html").format(
        policy=policy, style=style, script=script, content=embedded_json(content)
    )


def embedded_json(value: Any) -> str:
    """`value` as JSON that may stand within a script element: it holds no <, > or &."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # Halves of characters, which a tokenizer may give, cannot be written as UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")


def _asset(name: str) -> str:
    return (files("bigsae.reporting") / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
