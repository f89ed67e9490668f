"""Keeping access tokens and passwords out of what is published."""

from __future__ import annotations

import os
import re
from typing import Any

REMOVED = "[removed]"
_TOKEN = re.compile(r"\b(?:hf_(?:oauth_)?|api_org_)[A-Za-z0-9]{20,}")
# User and password of a URL: all that stands before the host. In JSON the slashes may be escaped, and quotes are.
_CREDENTIALS = re.compile(r"(:(?:\\?/){2})(?:[^\s/\"<>\\]|\\[^/\s])*@")
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
# Shorter ones could be a part of any word.
_SHORTEST = 8


def without_secrets(value: Any) -> Any:
    """A copy of `value`, of JSON's kinds, in which REMOVED stands for secrets, however deep inside.

    They are tokens of the Hub and of this environment, and what URLs hold of users and passwords.
    """
    if isinstance(value, dict):
        return {without_secrets(key): without_secrets(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    if not isinstance(value, str):
        return value
    for name in _VARIABLES:
        secret = os.environ.get(name, "")
        if len(secret) >= _SHORTEST:
            value = value.replace(secret, REMOVED)
    return _CREDENTIALS.sub(rf"\1{REMOVED}@", _TOKEN.sub(REMOVED, value))
