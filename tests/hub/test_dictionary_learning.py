"""Folders as dictionary_learning writes them, in our hands; and what pretends to be one."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bigsae
from bigsae.config import UserError
from bigsae.hub.formats import save_sae
from bigsae.sae.base import SAE
from bigsae.sae.jumprelu import JumpReLUSAE
from bigsae.sae.standard import StandardSAE
from bigsae.sae.topk import TopKSAE
from tests.hub.saes import D_IN, D_SAE, K, activations, assert_same, random_sae

LINEAR = {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "decoder.weight": (D_IN, D_SAE)}
SELECTING = {**LINEAR, "b_dec": (D_IN,), "threshold": ()}
PLAIN = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
# The tensors of each class, as its `state_dict` has them.
CLASSES: dict[str, dict[str, tuple[int, ...]]] = {
    "AutoEncoder": {**LINEAR, "bias": (D_IN,)},
    "AutoEncoderNew": {**LINEAR, "decoder.bias": (D_IN,)},
    "GatedAutoEncoder": {
        "encoder.weight": (D_SAE, D_IN),
        "decoder.weight": (D_IN, D_SAE),
        **dict.fromkeys(("r_mag", "gate_bias", "mag_bias"), (D_SAE,)),
        "decoder_bias": (D_IN,),
    },
    "JumpReluAutoEncoder": {**PLAIN, "threshold": (D_SAE,)},
    "AutoEncoderTopK": SELECTING,
    "BatchTopKSAE": SELECTING,
    "MatryoshkaBatchTopKSAE": {**PLAIN, "threshold": ()},
}


def state_of(name: str, threshold: float = 0.4) -> dict[str, Tensor]:
    """What its `ae.pt` holds."""
    generator = torch.Generator().manual_seed(4)
    state = {key: 0.3 * torch.randn(shape, generator=generator) for key, shape in CLASSES[name].items()}
    if "threshold" in state:
        state["threshold"] = (
            state["threshold"].abs() if name == "JumpReluAutoEncoder" else torch.tensor(threshold)
        )
    if "TopK" in name:
        state["k"] = torch.tensor(K, dtype=torch.int)
    if name == "MatryoshkaBatchTopKSAE":
        state["group_sizes"] = torch.tensor([16, D_SAE - 16])
    return state


def write(folder: Path, name: str, state: Any, **changes: Any) -> Path:
    """A folder as `trainSAE` leaves it."""
    folder.mkdir(exist_ok=True)
    trainer = {
        "dict_class": name,
        "activation_dim": D_IN,
        "dict_size": D_SAE,
        "lm_name": "some/model",
        "layer": 6,
    }
    if "TopK" in name:
        trainer["k"] = K
    config = {"trainer": trainer | changes, "buffer": {"d_submodule": D_IN, "io": "out"}}
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    torch.save(state, folder / "ae.pt")
    return folder


def latents_by_formula(name: str, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Latents as the class's `encode` gives them."""
    if name == "GatedAutoEncoder":
        linear = (x - state["decoder_bias"]) @ state["encoder.weight"].T
        magnitude = F.relu(state["r_mag"].exp() * linear + state["mag_bias"])
        return (linear + state["gate_bias"] > 0) * magnitude
    bias = state.get("bias", state.get("b_dec", torch.zeros(D_IN)))
    if name == "JumpReluAutoEncoder":
        bias = torch.zeros(D_IN)
    W_enc = state["W_enc"] if "W_enc" in state else state["encoder.weight"].T
    pre_acts = (x - bias) @ W_enc + state.get("b_enc", state.get("encoder.bias"))
    acts = F.relu(pre_acts)
    if name == "AutoEncoderTopK":
        values, indices = acts.topk(K, dim=-1)
        return torch.zeros_like(acts).scatter(-1, indices, values)
    if name == "AutoEncoder":  # from_pretrained brings decoder rows to norm 1
        return acts * state["decoder.weight"].norm(dim=0)
    return acts * (acts > state.get("threshold", torch.tensor(0.0)))


def output_by_formula(name: str, state: dict[str, Tensor], latents: Tensor) -> Tensor:
    """What the class's `decode` gives."""
    W_dec = state["W_dec"] if "W_dec" in state else state["decoder.weight"].T
    if name == "AutoEncoder":
        W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
    return latents @ W_dec + next(
        state[key] for key in ("bias", "decoder.bias", "decoder_bias", "b_dec") if key in state
    )


@pytest.mark.parametrize("name", CLASSES)
def test_computes_what_theirs_does(name, tmp_path):
    state, x = state_of(name), activations() / 20
    ours = bigsae.load_sae(write(tmp_path / "ae", name, state))
    assert ours.metadata["model_name"] == "some/model"
    expected = latents_by_formula(name, state, x)
    assert 0.01 < (expected > 0).float().mean() < 0.8
    assert_same(ours.encode(x), expected)
    assert_same(ours(x), output_by_formula(name, state, expected))
    ours.save(str(tmp_path / "again"))
    assert_same(bigsae.load_sae(tmp_path / "again")(x), ours(x))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("threshold", [0.4, -1.0])
def test_computes_what_their_own_classes_compute(name, threshold, tmp_path):
    # pip install --no-deps dictionary-learning==0.1.0: it asks for an older nnsight, which its classes do not need.
    utils = pytest.importorskip("dictionary_learning.utils")
    folder, x = write(tmp_path / "ae", name, state_of(name, threshold)), activations().flatten(0, 1) / 20
    theirs, _ = utils.load_dictionary(str(folder), "cpu")
    ours = bigsae.load_sae(folder)
    with torch.no_grad():
        assert_same(ours.encode(x), theirs.encode(x))
        assert_same(ours(x), theirs(x))


# What is written, and as which class.
WRITTEN: dict[str, tuple[Any, dict[str, Any], str]] = {
    "topk": ("topk", {"k": K}, "AutoEncoderTopK"),
    "topk not centred": ("topk", {"k": K, "apply_b_dec_to_input": False}, "AutoEncoderTopK"),
    "batchtopk": ("batchtopk", {"k": K}, "JumpReluAutoEncoder"),
    "matryoshka": ("matryoshka", {"k": K}, "JumpReluAutoEncoder"),
    "jumprelu": ("jumprelu", {}, "JumpReluAutoEncoder"),
    "jumprelu not centred": ("jumprelu", {"apply_b_dec_to_input": False}, "JumpReluAutoEncoder"),
    "gated": ("gated", {}, "GatedAutoEncoder"),
    "gated not centred": ("gated", {"apply_b_dec_to_input": False}, "GatedAutoEncoder"),
    "standard": ("standard", {}, "AutoEncoder"),
    "standard not centred": ("standard", {"apply_b_dec_to_input": False}, "AutoEncoderNew"),
}


def assert_same_function(found: Any, expected: SAE, x: Tensor) -> None:
    """The same output from the same latents, which a standard SAE's class has at another length."""
    latents = expected.encode(x)
    assert 0.01 < (latents > 0).float().mean() < 0.8
    if isinstance(expected, StandardSAE) and expected.shape.apply_b_dec_to_input:
        latents = latents * expected.W_dec.norm(dim=1)
    assert_same(found.encode(x), latents)
    assert_same(found(x), expected(x))


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_is_read_back(name, tmp_path):
    architecture, fields, theirs_is = WRITTEN[name]
    sae, x = random_sae(architecture, **fields), activations()
    save_sae(sae, tmp_path, format="dictionary_learning")
    assert {path.name for path in tmp_path.iterdir()} == {"ae.pt", "config.json"}
    trainer = json.loads((tmp_path / "config.json").read_text())["trainer"]
    assert trainer["dict_class"] == theirs_is
    assert (trainer["lm_name"], trainer["layer"], trainer["submodule_name"]) == (
        "some/model",
        6,
        "model.layers.6",
    )
    state = torch.load(tmp_path / "ae.pt", weights_only=True)
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    assert shapes == CLASSES[theirs_is] | ({"k": ()} if "k" in trainer else {})
    ours = bigsae.load_sae(tmp_path)
    assert ours.metadata["hook_name"] == "model.layers.6"
    assert_same_function(ours, sae, x)
    save_sae(ours, tmp_path / "again", format="dictionary_learning")
    assert_same_function(bigsae.load_sae(tmp_path / "again"), sae, x)


@pytest.mark.parametrize("name", WRITTEN)
def test_their_own_classes_compute_what_was_written(name, tmp_path, capsys):
    utils = pytest.importorskip("dictionary_learning.utils")
    architecture, fields, _ = WRITTEN[name]
    sae, x = random_sae(architecture, **fields), activations().flatten(0, 1)
    save_sae(sae, tmp_path, format="dictionary_learning")
    theirs, _ = utils.load_dictionary(str(tmp_path), "cpu")
    with torch.no_grad():
        assert_same_function(theirs, sae, x)
    assert (
        "Normalizing" not in capsys.readouterr().out
    )  # which it checks with a tolerance that large SAEs miss


def test_what_it_has_no_class_for_is_refused(tmp_path):
    dead = random_sae("standard")
    dead.W_dec[3] = 0
    for sae, message in (
        (random_sae("topk", k=K, d_out=D_IN), "no transcoders"),
        (random_sae("jumprelu", d_out=D_IN, skip=True), "no transcoders"),
        (random_sae("gated", normalize="layer_norm"), "normalises nothing"),
        (dead, "one of this SAE is zero"),
    ):
        with pytest.raises(UserError, match=message):
            save_sae(sae, tmp_path / "a", format="dictionary_learning")
    assert not (tmp_path / "a").exists()


def test_written_over_another_format_it_is_what_is_read(tmp_path):
    save_sae(random_sae("topk", k=K), tmp_path)
    save_sae(random_sae("gated"), tmp_path, format="dictionary_learning")
    assert bigsae.load_sae(tmp_path).architecture == "gated"


def test_thresholds(tmp_path):
    """-1 is none yet, where a ReLU remains; TopK's is not used by its encode, and kept."""
    x = activations() / 20
    state = state_of("BatchTopKSAE", threshold=-1.0)
    ours = bigsae.load_sae(write(tmp_path / "batch", "BatchTopKSAE", state))
    assert isinstance(ours, JumpReLUSAE) and not ours.threshold.any()
    assert_same(ours.encode(x), latents_by_formula("BatchTopKSAE", state, x))
    topk = bigsae.load_sae(write(tmp_path / "topk", "AutoEncoderTopK", state_of("AutoEncoderTopK", 0.25)))
    assert isinstance(topk, TopKSAE) and topk.metadata["threshold"] == 0.25
    assert (topk.encode(x) > 0).sum(-1).max() == K


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dict_class": "IdentityDict"}, "dict_class 'IdentityDict'"),
        ({"dict_class": ["AutoEncoder"]}, "dict_class"),
        ({"dict_class": "GatedAutoEncoder"}, "holds"),
        ({"dict_size": D_SAE + 1}, "holds"),
        ({"activation_dim": None}, "activation_dim None"),
        ({"k": K + 1}, f"k is not the {K + 1} that"),
    ],
)
def test_refuses_what_it_would_misread(changes, message, tmp_path):
    folder = write(tmp_path / "ae", "AutoEncoderTopK", state_of("AutoEncoderTopK"), **changes)
    with pytest.raises(UserError, match=message):
        bigsae.load_sae(folder)


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled_but_tensors(tmp_path):
    caught = tmp_path / "executed"
    state = state_of("AutoEncoder")
    for evil in (Malicious(caught), state | {"bias": Malicious(caught)}):
        folder = write(tmp_path / "ae", "AutoEncoder", evil)
        with pytest.raises(UserError, match=r"ae\.pt"):
            bigsae.load_sae(folder)
    (folder / "ae.pt").write_bytes(pickle.dumps(Malicious(caught)))
    with pytest.raises(UserError, match=r"ae\.pt"):
        bigsae.load_sae(folder)
    assert not caught.exists()
    torch.load(write(tmp_path / "ae", "AutoEncoder", Malicious(caught)) / "ae.pt", weights_only=False)
    assert caught.exists()  # it would have been


def test_broken_files_are_a_users_error(tmp_path):
    state = state_of("AutoEncoder")
    folder = write(tmp_path / "ae", "AutoEncoder", state)
    whole = (folder / "ae.pt").read_bytes()
    for size in (0, 100, len(whole) - 1):
        (folder / "ae.pt").write_bytes(whole[:size])
        with pytest.raises(UserError, match="cannot be read"):
            bigsae.load_sae(folder)
    for other in ([1, 2], {"bias": 3}, state | {"bias": torch.zeros(D_IN, device="meta")}):
        with pytest.raises(UserError, match="other things than tensors"):
            bigsae.load_sae(write(folder, "AutoEncoder", other))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        bigsae.load_sae(folder)


def test_files_much_larger_than_the_configuration_says_are_not_read(tmp_path):
    """Nor compressed ones, which are small but grow, and which torch never writes and would misread where mapped."""
    for state in (state_of("AutoEncoder") | {"more": torch.zeros(1 << 19)}, state_of("AutoEncoder")):
        folder = write(tmp_path / "ae", "AutoEncoder", state)
        if "more" in state:
            with pytest.raises(UserError, match="it is not loaded"):
                bigsae.load_sae(folder)
        with zipfile.ZipFile(folder / "ae.pt") as stored, zipfile.ZipFile(tmp_path / "packed", "w") as packed:
            for entry in stored.infolist():
                packed.writestr(entry.filename, stored.read(entry), zipfile.ZIP_DEFLATED)
        (tmp_path / "packed").replace(folder / "ae.pt")
        assert (folder / "ae.pt").stat().st_size < 100_000
        with pytest.raises(UserError, match="it is not loaded"):
            bigsae.load_sae(folder)
