"""Any configuration: it is taken, or refused by a message that names a flag. Nothing else is ever raised."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigsae.checks import (
    check,
    check_sources,
    resolve_d_sae,
    resolve_lr,
    resolve_prefixes,
    resolve_threshold_lr,
)
from bigsae.config import OptimConfig, SAEConfig, TrainConfig, UserError
from bigsae.lm.layout import resolve_layout
from bigsae.training.sharing import check_mesh
from bigsae.training.variants import check_variants, make_jobs, variants, with_sweep_read

WIDTHS = {"a": 32, "b": 48}
BASE = TrainConfig(
    model="m",
    dataset="d",
    hookpoints=("a", "b"),
    output_dir="nowhere",
    tokens=1 << 20,
    batch_size_tokens=1200,
)
INTEGERS = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([0, 1, 2**31, 2**48, 2**62, 2**63, 2**64, 10**30, 10**5000, -(10**5000)]),
)
FLOATS = st.one_of(
    st.floats(-2, 2), st.sampled_from([0.0, 1.0, 0.999, 1e300, -1e300, 5e-324, float("inf"), float("nan")])
)
TEXTS = st.one_of(
    st.sampled_from(["", "{}", "[", "[" * 9999, "a\0b", "9" * 5000, '{"a": 1}', "\ud800"]), st.text()
)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of an option of this type, the odd ones often."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(st.none() if a is type(None) else values(a) for a in arguments))
    if origin is tuple:
        return st.lists(values(arguments[0]), max_size=4).map(tuple)
    return {bool: st.booleans(), int: INTEGERS, float: FLOATS, str: TEXTS}[hint]


def options(cls: type, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The type of each option, by its path."""
    found: dict[tuple[str, ...], Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            found |= options(typing.cast(type, hint), (*prefix, name))
        else:
            found[*prefix, name] = hint
    return found


OPTIONS = {path: hint for path, hint in options(TrainConfig).items() if path != ("sweep",)}
SWEPT = [
    f"{group}.{f.name}"
    for group, cls in (("sae", SAEConfig), ("optim", OptimConfig))
    for f in dataclasses.fields(cls)
]
WORDS = st.one_of(
    st.sampled_from(
        ["1", "2", "None", "true", "1e-4", "-1", "Infinity", "NaN", "topk", "jumprelu", "[", "9" * 5000]
    ),
    st.text(max_size=4),
)
AXES = st.builds(
    lambda option, words: f"{option}={','.join(words)}",
    st.one_of(st.sampled_from([*SWEPT, "seed", "tokens"]), st.text(max_size=5)),
    st.lists(WORDS, min_size=1, max_size=3),
)


def with_option(config: Any, path: tuple[str, ...], value: Any) -> Any:
    name, *rest = path
    return replace(
        config, **{name: with_option(getattr(config, name), tuple(rest), value) if rest else value}
    )


@st.composite
def configs(draw: st.DrawFn) -> TrainConfig:
    """A right configuration with a few options of any value, and often a sweep."""
    config = replace(BASE, sae=replace(BASE.sae, architecture=draw(values(OPTIONS["sae", "architecture"]))))
    for path in draw(st.lists(st.sampled_from(list(OPTIONS)), max_size=5, unique=True)):
        config = with_option(config, path, draw(values(OPTIONS[path])))
    sweep = draw(st.one_of(st.just(()), st.lists(AXES, max_size=3).map(tuple), st.tuples(TEXTS)))
    return replace(config, sweep=sweep)


def prepared(config: TrainConfig, num_ranks: int) -> int:
    """All that a run finds out about its options before it looks at model and data; the number of its SAEs."""
    check_sources(config)
    check(config, num_ranks)
    config = with_sweep_read(config)
    made = variants(config)
    check_variants(config, made)
    resolve_layout(config.lm, num_ranks, num_ranks, env={})
    jobs = make_jobs(
        [("a", "a"), ("b", "b")], made, WIDTHS, num_ranks if config.mesh.distribute_saes else None
    )
    check_mesh(config, jobs, WIDTHS, num_ranks)
    for job in jobs:
        d_sae = resolve_d_sae(job.variant.sae, WIDTHS[job.reads])
        assert resolve_prefixes(job.variant.sae, d_sae)[-1] == d_sae
        rate = resolve_lr(job.variant.optim, d_sae)
        assert resolve_threshold_lr(job.variant.sae, rate, config.num_steps) > 0
    return len(jobs)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(config=configs(), num_ranks=st.sampled_from([1, 2, 3, 8]))
def test_any_configuration_is_taken_or_refused_with_a_flag(config, num_ranks):
    message = ""
    try:
        assert prepared(config, num_ranks) >= 2
    except UserError as error:
        message = str(error)
    assert not message or re.search(r"--[a-z]", message), message
    assert len(message) < 500


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_the_base_is_right(num_ranks):
    """So that what is refused is refused for what was changed."""
    assert prepared(BASE, num_ranks) == 2
