"""Folders of SAEs that are torn, of no kind that is known, or harmful."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.bad_input.cases import (
    HOOKPOINT,
    Case,
    Change,
    Harm,
    call,
    copied,
    cut,
    holding,
    train,
    with_json,
    without,
)


def measured(message: str, format: str, *changes: Change) -> Case:
    """An evaluation of a copy of an SAE's folder, to which `changes` were made."""
    prepare = copied("saes", *[lambda folder, change=change: change(folder / format) for change in changes])
    return call("evaluate", f"--saes {{tmp}}/saes/{format}", r"--saes.*" + message, prepare)


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def rewrite(folder: Path) -> None:
        values = {name: value.clone() for name, value in load_file(folder / file).items()}
        change(values)
        save_file(values, folder / file)

    return rewrite


def header(text: str | bytes, size: int | None = None) -> Change:
    """A file of safetensors that is nothing but a header, which may say that it is longer."""
    raw = text.encode() if isinstance(text, str) else text
    return holding(WEIGHTS, struct.pack("<Q", len(raw) if size is None else size) + raw)


def pickled(value: Any) -> Change:
    return lambda folder: torch.save(value, folder / "ae.pt")


def bomb(folder: Path) -> None:
    with zipfile.ZipFile(folder / "ae.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\0" * (64 << 20))


WEIGHTS, AGAIN = "sae_weights.safetensors", "save or download it again"
NAN = tensors(WEIGHTS, lambda t: t["W_dec"][3].fill_(torch.nan))
CASES: dict[str, Case] = {
    "no such folder": call(
        "evaluate",
        "--saes {home}/nowhere",
        r"--saes: .*nowhere is no folder: give that of a run or of an SAE",
    ),
    "no configuration": measured("it holds no SAE: give another folder", "saelens", without("cfg.json")),
    "no weights": measured(
        r"sae_weights\.safetensors cannot be read \(No such file.*" + AGAIN, "saelens", without(WEIGHTS)
    ),
    "cut weights": measured(r"cannot be read \(.*" + AGAIN, "saelens", cut(WEIGHTS, 5000)),
    "no bytes": measured(r"cannot be read \(.*" + AGAIN, "saelens", holding(WEIGHTS, b"")),
    "a header beyond all memory": measured(
        r"cannot be read \(.*header too large", "saelens", header("{}", 2**60)
    ),
    "a shape that overflows": measured(
        r"cannot be read \(",
        "saelens",
        header('{"W_enc": {"dtype": "F32", "shape": [4294967296, 4294967296, 9], "data_offsets": [0, 4]}}'),
    ),
    "a deep header": measured(r"cannot be read \(", "saelens", header('{"a":' * 5000)),
    "bytes beyond the file": measured(
        r"cannot be read \(",
        "saelens",
        header('{"W_enc": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4398046511104]}}'),
    ),
    "other shapes": measured(
        r"calls for W_enc \[32, 64\], it holds \[64, 32\]",
        "saelens",
        tensors(WEIGHTS, lambda t: t.update(W_enc=t["W_enc"].T.contiguous())),
    ),
    "a tensor too few": measured(
        r"calls for b_dec \[32\], it holds no such tensor",
        "saelens",
        tensors(WEIGHTS, lambda t: t.pop("b_dec")),
    ),
    "a tensor too many": measured(
        r"does not call for \['more'\]", "saelens", tensors(WEIGHTS, lambda t: t.update(more=torch.zeros(1)))
    ),
    "integers": measured(
        r"'b_dec' is torch\.int64, which holds no weights",
        "saelens",
        tensors(WEIGHTS, lambda t: t.update(b_dec=t["b_dec"].long())),
    ),
    "no numbers": measured(r"W_dec holds NaN: .*take an earlier checkpoint", "saelens", NAN),
    "an unknown architecture": measured(
        "architecture 'temporal' cannot be loaded; known is topk",
        "saelens",
        with_json("cfg.json", architecture="temporal"),
    ),
    "no width": measured(
        "d_in None must be an integer greater than 0", "saelens", with_json("cfg.json", d_in=None)
    ),
    "an absurd width": measured(
        "d_sae .* is beyond all that an SAE can have", "saelens", with_json("cfg.json", d_sae=10**40)
    ),
    "k beyond the latents": measured(
        r"k 65 exceeds the number of latents 64", "saelens", with_json("cfg.json", k=65)
    ),
    "a configuration of a list": measured(
        "holds no configuration of an SAE", "saelens", holding("cfg.json", "[]")
    ),
    "a torn configuration": measured("cfg.json is not JSON", "saelens", cut("cfg.json", 50)),
    "sparsify's groups": measured(
        "activation 'groupmax' cannot be loaded; known is topk",
        "sparsify",
        with_json("cfg.json", activation="groupmax"),
    ),
    "sparsify's products": measured(
        "expansion_factor .* is beyond",
        "sparsify",
        with_json("cfg.json", num_latents=0, expansion_factor=10**4000),
    ),
    "a pickle with code": measured(
        "other things than tensors .*may be harmful", "dictionary_learning", pickled({"b_dec": Harm()})
    ),
    "code alone": measured(
        "other things than tensors .*may be harmful", "dictionary_learning", pickled(Harm())
    ),
    "a pickle of no zip": measured(
        "cannot be read", "dictionary_learning", holding("ae.pt", pickle.dumps(Harm()))
    ),
    "a zip bomb": measured(
        r"67108864 bytes are not the \d+ weights that config.json calls for", "dictionary_learning", bomb
    ),
    "a torn zip": measured(r"cannot be read \(.*" + AGAIN, "dictionary_learning", cut("ae.pt", 4000)),
    "an unknown class": measured(
        "dict_class 'Other' cannot be loaded; known is",
        "dictionary_learning",
        with_json("config.json", trainer={"dict_class": "Other"}),
    ),
    "a start that is none": train(
        r"--sae\.init-from: .*nowhere cannot be read as an SAE", sae__init_from="{home}/nowhere"
    ),
    "a start with NaN": train(
        r"--sae\.init-from: .*W_dec holds NaN",
        copied("saes", lambda f: NAN(f / "saelens")),
        sae__init_from="{tmp}/saes/saelens",
    ),
    "a start of another width": train(
        r"--sae\.init-from holds an SAE of d_sae 64, not 128: set --sae\.d-sae 64",
        sae__init_from="{home}/saes/saelens",
        sae__d_sae=128,
    ),
    "a start of another kind": train(
        r"--sae\.init-from holds a topk SAE: set --sae\.architecture topk",
        sae__init_from="{home}/saes/saelens",
        sae__architecture="gated",
        sae__k=None,
    ),
    "a broken SAE to export": call(
        "export",
        "{tmp}/saes/saelens --output {tmp}/out",
        r"calls for b_dec",
        copied("saes", lambda f: tensors(WEIGHTS, lambda t: t.pop("b_dec"))(f / "saelens")),
    ),
    "a link out of the folder": call(
        "export",
        "{tmp}/saes --output {tmp}/out",
        r"leads out of .*it is not exported",
        copied(
            "saes",
            lambda f: [
                (f / "saelens" / WEIGHTS).unlink(),
                (f / "saelens" / WEIGHTS).symlink_to("/etc/hostname"),
            ],
        ),
    ),
    "a broken SAE to report": call(
        "report",
        "{tmp}/run --no-contexts",
        r"sae_weights\.safetensors cannot be read",
        copied("run", cut(f"{HOOKPOINT}/{WEIGHTS}", 99)),
    ),
}
