"""The format of dictionary_learning (checked against 0.1.0): config.json and ae.pt.

Its classes name the same tensors differently; `decoder.weight` of an nn.Linear is [d_in, d_sae], as is a `W_enc`. What
is read computes what its `utils.load_dictionary` gives, and that computes what was written. Those with one threshold
become JumpReLU SAEs, as in SAELens, and SAEs with thresholds are written as its JumpReluAutoEncoder.
"""

from __future__ import annotations

import math
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigsae.config import UserError, short
from bigsae.hub.weights import check_k, check_tensors, counts, fill, read_json, unit_decoder
from bigsae.sae.base import SAE, Shape
from bigsae.sae.gated import GatedSAE
from bigsae.sae.jumprelu import JumpReLUSAE
from bigsae.sae.standard import StandardSAE
from bigsae.sae.topk import TopKSAE

CONFIG, WEIGHTS = "config.json", "ae.pt"
_LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
# Each class's tensors, and what they are here; k and group_sizes, which are integers, aside.
_CLASSES: dict[str, dict[str, str]] = {
    "AutoEncoder": {**_LINEAR, "bias": "b_dec"},
    "AutoEncoderNew": {**_LINEAR, "decoder.bias": "b_dec"},
    "GatedAutoEncoder": {
        "encoder.weight": "W_enc",
        "decoder.weight": "W_dec",
        "decoder_bias": "b_dec",
        "gate_bias": "b_gate",
        "mag_bias": "b_mag",
        "r_mag": "r_mag",
    },
    "JumpReluAutoEncoder": _PLAIN,
    "AutoEncoderTopK": {**_LINEAR, "b_dec": "b_dec", "threshold": "threshold"},
    "BatchTopKSAE": {**_LINEAR, "b_dec": "b_dec", "threshold": "threshold"},
    "MatryoshkaBatchTopKSAE": _PLAIN,
}
_WITH_K = ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")
_TRANSPOSED = ("W_enc", "decoder.weight")
# Beside the weights, at up to 8 bytes each, the file holds some pickled names, and padding.
_SLACK_BYTES = 1 << 20
_ROWS_AT_ONCE = 8192
# Opcodes that name what is called, and all that a state_dict calls. STACK_GLOBAL, which takes its name from the stack,
# and so has none here, is of a protocol that torch.save does not use.
_CALLS = ("GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4")
_TENSORS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage|torch\.storage \w+Storage"
)


def exported(sae: SAE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What config.json and ae.pt hold for `sae`. Raises UserError where dictionary_learning cannot hold it."""
    if sae.is_transcoder or sae.W_skip is not None:
        raise UserError("dictionary_learning has no transcoders: save it in another format")
    if sae.shape.normalize != "none":
        raise UserError("dictionary_learning normalises nothing, this SAE does: save it in SAELens's format")
    if isinstance(sae, TopKSAE):
        name, more = "AutoEncoderTopK", {"k": sae.k}
        tensors = sae.saelens_tensors() | {"b_enc": _bias(sae, "b_enc", True)}
        # Theirs, which only `use_threshold=True` takes; -1 stands for none.
        tensors["threshold"] = torch.tensor(float(sae.metadata.get("threshold", -1.0)))
    elif isinstance(sae, GatedSAE):
        name, more = "GatedAutoEncoder", {}
        tensors = sae.saelens_tensors() | {bias: _bias(sae, bias, True) for bias in sae.encoder_biases}
    elif isinstance(sae, StandardSAE) and sae.shape.apply_b_dec_to_input:
        # Its reader brings decoder rows to norm 1, and fails where that changes the output of a test by 1e-4.
        name, more, tensors = "AutoEncoder", {}, unit_decoder(sae.saelens_tensors())
        if not bool(tensors["W_dec"].any(dim=1).all()):
            raise UserError("dictionary_learning brings decoder rows to norm 1, and one of this SAE is zero")
    elif isinstance(sae, StandardSAE):
        name, more, tensors = "AutoEncoderNew", {}, sae.saelens_tensors()
    else:
        name, more = "JumpReluAutoEncoder", {}
        tensors = sae.saelens_tensors() | {"b_enc": _bias(sae, "b_enc", False)}
    named = {
        theirs: tensors[ours].T if theirs in _TRANSPOSED else tensors[ours]
        for theirs, ours in _CLASSES[name].items()
    }
    if name in _WITH_K:
        named["k"] = torch.tensor(more["k"], dtype=torch.int)
    trainer = {"dict_class": name, "activation_dim": sae.d_in, "dict_size": sae.d_sae, **more}
    return _config(sae, trainer), named


def _config(sae: SAE, trainer: dict[str, Any]) -> dict[str, Any]:
    metadata = {key: value for key, value in sae.metadata.items() if key != "dictionary_learning"}
    hookpoint = str(metadata.get("hook_name", ""))
    layer = re.search(r"\.(\d+)\b", hookpoint)
    origin = {
        "lm_name": metadata.get("model_name"),
        "layer": int(layer[1]) if layer else None,
        "submodule_name": hookpoint,
    }
    buffer = {
        "d_submodule": sae.d_in,
        "io": "in" if hookpoint.endswith(":input") else "out",
        "ctx_len": metadata.get("context_size"),
    }
    return {"trainer": trainer | origin, "buffer": buffer, "metadata": metadata}


def _bias(sae: SAE, name: str, subtracts: bool) -> Tensor:
    """Bias `name` [d_sae] for an encoder that subtracts b_dec from its input, or does not; `sae` may do the other."""
    bias = sae.get_parameter(name).detach()
    if sae.shape.apply_b_dec_to_input == subtracts:
        return bias
    b_dec = sae.b_dec.detach().double()
    # In float64: b_dec is as long as activations are, and what is left of it decides which latents fire.
    shift = torch.cat([rows.double() @ b_dec for rows in sae.W_enc.detach().split(_ROWS_AT_ONCE)])
    if name == "b_mag":
        shift = shift * sae.get_parameter("r_mag").detach().double().exp()
    return bias.double() + (shift if subtracts else -shift)


def read(folder: Path) -> SAE:
    """The SAE that dictionary_learning wrote to `folder`. Raises UserError where it is none of ours.

    Of an AutoEncoderTopK the k largest latents are taken, as its `encode` does by default; its threshold, which
    `use_threshold=True` takes instead, is kept in the metadata.
    """
    path = folder / CONFIG
    config = read_json(path)
    own = config.pop("metadata", None)
    trainer = config.get("trainer")
    name = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if not isinstance(trainer, dict) or not isinstance(name, str) or name not in _CLASSES:
        raise UserError(f"{path}: dict_class {short(name)} cannot be loaded; known is {', '.join(_CLASSES)}")
    d_in, d_sae = counts(trainer, path, "activation_dim", "dict_size")
    apply_b_dec_to_input = name not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    shape = Shape(d_in, d_sae, apply_b_dec_to_input=apply_b_dec_to_input)
    tensors = _read_tensors(folder / WEIGHTS, name, trainer, d_in, d_sae)
    metadata = {"model_name": trainer.get("lm_name"), "dictionary_learning": config}
    metadata = own if isinstance(own, dict) else metadata
    if name == "AutoEncoderTopK":
        (k,) = counts(trainer, path, "k")
        check_k(k, d_sae, path)
        metadata["threshold"] = tensors.pop("threshold").item()
        return fill(TopKSAE(shape, k, device="meta"), tensors, metadata)
    if name == "GatedAutoEncoder":
        return fill(GatedSAE(shape, device="meta"), tensors, metadata)
    if name == "AutoEncoder":
        return fill(StandardSAE(shape, device="meta"), unit_decoder(tensors), metadata)
    if name == "AutoEncoderNew":
        return fill(StandardSAE(shape, device="meta"), tensors, metadata)
    # -1 stands for a threshold that no step has set yet: the ReLU, which theirs always has, remains.
    tensors["threshold"] = tensors["threshold"].clamp(min=0).expand(d_sae)
    return fill(JumpReLUSAE(shape, device="meta"), tensors, metadata)


def _read_tensors(path: Path, name: str, trainer: dict[str, Any], d_in: int, d_sae: int) -> dict[str, Tensor]:
    """The tensors of a dictionary of class `name` in `path`, under our names and in our layout."""
    names = _CLASSES[name]
    sizes = {"W_enc": (d_sae, d_in), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    shapes = {theirs: sizes.get(ours, (d_sae,)) for theirs, ours in names.items()}
    shapes |= {theirs: shape[::-1] for theirs, shape in shapes.items() if theirs in _TRANSPOSED}
    if name in _WITH_K:
        shapes["threshold"] = ()
    tensors = _load(path, sum(math.prod(shape) for shape in shapes.values()))
    if name in _WITH_K:
        found = tensors.pop("k", None)
        if found is None or found.numel() != 1 or found.item() != trainer.get("k"):
            said = short(trainer.get("k"))
            raise UserError(
                f"{path}: its k is not the {said} that config.json says: save or download both again"
            )
    if name == "MatryoshkaBatchTopKSAE":
        # All groups are active in what is saved; config.json has their sizes.
        tensors.pop("group_sizes", None)
    check_tensors(tensors, shapes, path)
    return {
        ours: tensors[theirs].T if theirs in _TRANSPOSED else tensors[theirs]
        for theirs, ours in names.items()
    }


def _load(path: Path, num_weights: int) -> dict[str, Tensor]:
    """The tensors in `path`, which should hold about `num_weights` numbers; nothing else is ever unpickled."""
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
            num_bytes = max(path.stat().st_size, sum(entry.file_size for entry in entries))
            if num_bytes > 8 * num_weights + _SLACK_BYTES or any(entry.compress_type for entry in entries):
                raise UserError(
                    f"{path}: {num_bytes} bytes are not the {num_weights} weights that config.json calls for: it is "
                    "not loaded"
                )
            for entry in entries:
                if entry.filename.endswith("data.pkl"):
                    _check_pickle(file.read(entry), path)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        # The last two: of a version of zip, or with a password, that no writer of tensors uses. The first: torn names.
        raise UserError(f"{path} cannot be read ({error}): save or download it again") from None
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # A pickle that is torn, or none of tensors, fails in any way.
        # Without torch's text, which tells how to load it all the same.
        kind = type(error).__name__
        raise UserError(f"{path} cannot be read as tensors ({kind}): save or download it again") from None
    if not isinstance(tensors, dict) or not all(_is_plain(tensor) for tensor in tensors.values()):
        raise UserError(f"{path} holds other things than tensors: it is not loaded")
    return dict(tensors)


def _check_pickle(pickled: bytes, path: Path) -> None:
    """Find what a file of tensors has no use for; what torch allows beyond it can take any amount of memory."""
    try:
        called = {
            str(argument) for opcode, argument, _ in pickletools.genops(pickled) if opcode.name in _CALLS
        }
    except ValueError as error:
        raise UserError(f"{path} is torn ({error}): save or download it again") from None
    foreign = {name for name in called if not _TENSORS.fullmatch(name)}
    if foreign:
        raise UserError(
            f"{path} holds other things than tensors ({short(min(foreign))}): it may be harmful, and is not loaded"
        )


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor of as many elements as the file holds: strides of 0 make gigabytes of a few bytes."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return value.is_contiguous() or (value.ndim == 2 and value.T.is_contiguous())
