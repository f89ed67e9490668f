"""The model card of published SAEs: what they are, how good, how they were trained, and how to load them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from huggingface_hub import ModelCardData

from bigsae.config import TrainConfig
from bigsae.hub.curves import merged_rows, name_of
from bigsae.hub.formats import Format
from bigsae.hub.names import is_hub_name, shown
from bigsae.sae.base import SAE

# What of a row of metrics.jsonl is shown, where it has it.
_MEASURES = {
    "fvu": "FVU",
    "l0": "L0",
    "dead_fraction": "dead",
    "loss": "loss",
    "heldout_fvu": "held-out FVU",
    "heldout_l0": "held-out L0",
}
_CURVE_ROWS = 12
_MOST_CURVES = 32
_LIBRARIES: dict[Format, str] = {
    "saelens": "saelens",
    "sparsify": "sparsify",
    "dictionary_learning": "dictionary-learning",
}


@dataclass(frozen=True)
class Entry:
    """One published SAE."""

    name: str
    """Its folder."""
    kind: str
    """Architecture as it was saved, with its k."""
    shape: str
    hookpoint: str
    format: Format
    tokens: int | None
    metadata: Mapping[str, Any]


def entry(name: str, sae: SAE, format: Format) -> Entry:
    """What the card says of `sae`, which was written to the folder `name`."""
    what = "transcoder" if sae.is_transcoder else "SAE"
    k = f", k {sae.k}" if isinstance(getattr(sae, "k", None), int) else ""
    target = f" to {sae.d_out}" if sae.is_transcoder else ""
    hookpoint = str(sae.metadata.get("hook_name") or "")
    if sae.is_transcoder:
        hookpoint += f" to {sae.metadata.get('hook_name_out') or '?'}"
    tokens = sae.metadata.get("training_tokens")
    return Entry(
        name,
        f"{sae.architecture} {what}{k}",
        f"{sae.d_in}{target} x {sae.d_sae:,}",
        hookpoint,
        format,
        tokens if isinstance(tokens, int) else None,
        sae.metadata,
    )


def model_card(
    source: str,
    on_hub: bool,
    entries: Sequence[Entry],
    config: TrainConfig | None,
    rows: Sequence[Mapping[str, Any]],
    base_model: str,
    dataset: str,
    license: str,
    picture: str | None = None,
) -> str:
    """README.md of the repository, or folder, `source` with the SAEs `entries`.

    `config` and `rows` (of metrics.jsonl) are those of their run, where there is one. `base_model` and `dataset` count
    as the Hub's where they are no folders here and look like its names; of others the path is not told. `picture` is
    the file beside it that shows the learning curves.
    """
    formats: list[Format] = list(dict.fromkeys(e.format for e in entries))
    library: Format = "saelens" if "saelens" in formats else formats[0]
    data = ModelCardData(
        library_name=_LIBRARIES[library],
        license=license,
        base_model=base_model if is_hub_name(base_model) else None,
        datasets=[dataset] if is_hub_name(dataset) else None,
        tags=["sparse-autoencoder", "sae", "interpretability", "bigsae", *(_LIBRARIES[f] for f in formats)],
    )
    title = source.rpartition("/")[2]
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {title}",
        _origin(entries, base_model, dataset),
        _table(
            ("folder", "what", "d_in x d_sae", "hookpoint", "trained tokens"),
            [
                (
                    f"`{e.name}`",
                    e.kind,
                    e.shape,
                    e.hookpoint and f"`{e.hookpoint}`",
                    f"{e.tokens:,}" if e.tokens else "",
                )
                for e in entries
            ],
        ),
        "## Loading",
        _loading(source, on_hub, entries[0]),
    ]
    if rows:
        parts += ["## Metrics", _metrics(entries, rows), _MEANINGS]
        parts += ["## Learning curves", *_picture(picture), _curves(entries, rows)]
    if config is not None:
        parts += ["## Training", _training(config)]
    return "\n\n".join(parts) + "\n"


_MEANINGS = (
    "FVU: squared error of the reconstruction, divided by the variance about the mean. L0: latents that fire on a "
    "token. dead: share of latents that have not fired for long. The last row that was logged; held-out: on documents "
    "that were never trained on. Learning curves of all rows are in `metrics.jsonl`."
)


def _origin(entries: Sequence[Entry], base_model: str, dataset: str) -> str:
    """What is known of where they come from; other tools' SAEs that bigsae wrote in its way are not called its own."""
    ours = all("bigsae_version" in e.metadata for e in entries)
    text = "Sparse autoencoders" + (f" of activations of {shown(base_model)}" if base_model else "")
    if dataset or ours:
        text += ", trained" + (f" on {shown(dataset)}" if dataset else "")
    return f"{text} with bigsae." if ours else f"{text}. Written by bigsae."


def _loading(source: str, on_hub: bool, example: Entry) -> str:
    code = [
        "import bigsae",
        "",
        f"sae = bigsae.load_sae({source!r}, {example.name!r})",
        "x_hat = sae(x)  # [..., d_in]",
    ]
    text = ["```python", *code, "```"]
    if example.format == "saelens":
        call = f"from_pretrained({source!r}, {example.name!r})"
        if not on_hub:
            call = f"load_from_disk({source + '/' + example.name!r})"
        text += [
            "",
            "or with SAELens:",
            "",
            "```python",
            "from sae_lens import SAE",
            "",
            f"sae = SAE.{call}",
            "```",
        ]
    return "\n".join(text)


def _metrics(entries: Sequence[Entry], rows: Sequence[Mapping[str, Any]]) -> str:
    latest: dict[str, dict[str, Any]] = {e.name: {} for e in entries}
    for row in rows:
        if name_of(row) in latest:
            latest[name_of(row)].update({k: v for k, v in row.items() if k in _MEASURES})
    shown = [key for key in _MEASURES if any(key in values for values in latest.values())]
    return _table(
        ("", *(_MEASURES[key] for key in shown)),
        [(f"`{name}`", *(_number(values.get(key)) for key in shown)) for name, values in latest.items()],
    )


def _picture(name: str | None) -> list[str]:
    return [] if name is None else [f"![Loss, FVU and L0 over tokens]({name})"]


def _curves(entries: Sequence[Entry], rows: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for e in entries[:_MOST_CURVES]:
        # Steps at which only held-out documents were measured show nothing of training.
        own = [values for values in merged_rows(e.name, rows) if "fvu" in values]
        if not own:
            continue
        last = len(own) - 1
        picks = sorted({round(i * last / (_CURVE_ROWS - 1)) for i in range(_CURVE_ROWS)})
        shown = [key for key in _MEASURES if any(key in own[i] for i in picks)]
        table = _table(
            ("tokens", *(_MEASURES[key] for key in shown)),
            [(f"{own[i]['tokens']:,}", *(_number(own[i].get(key)) for key in shown)) for i in picks],
        )
        parts.append(
            f"<details{' open' if not parts else ''}><summary>{escape(e.name)}</summary>\n\n{table}\n\n</details>"
        )
    if len(entries) > _MOST_CURVES:
        parts.append(f"Those of {len(entries) - _MOST_CURVES} more are in `metrics.jsonl`.")
    return "\n\n".join(parts)


def _training(config: TrainConfig) -> str:
    options = {
        "--sae.architecture": config.sae.architecture,
        "--tokens": f"{config.tokens:,}",
        "--batch-size-tokens": f"{config.batch_size_tokens:,}",
        "--ctx-len": config.ctx_len,
        "--sae.k": config.sae.k,
        "--sae.target-l0": config.sae.target_l0,
        "--optim.lr": config.optim.lr,
        "--sweep": " ".join(config.sweep),
        "--seed": config.seed,
    }
    table = _table(
        ("option", "value"), [(f"`{k}`", f"{v}") for k, v in options.items() if v not in (None, "")]
    )
    again = "All options are in `config.json`; `python -m bigsae.train --config config.json` reads them back."
    return f"{table}\n\n{again}"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
