"""Opening a cache to look at what it holds."""

from __future__ import annotations

from collections.abc import Sequence

from bigsae.data.activation_cache import ActivationCache
from bigsae.training.cached import find_cache, open_cache


def open_activations(name: str, hookpoints: Sequence[str] = ()) -> ActivationCache:
    """The cache `name`, a folder or a Hub id, with the activations of `hookpoints` (all where not given).

    `cache(cache.as_rows([0, 1]))` gives {hookpoint: [2, ctx_len, d_in]}, `cache.tokens(0)` the token ids of row 0 and
    which of its positions are kept. Raises UserError where there is no such cache, or it is not whole.
    """
    found = find_cache(str(name))
    return open_cache(found, tuple(hookpoints) or tuple(found.index.hookpoints))
