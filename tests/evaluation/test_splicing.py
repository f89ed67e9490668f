"""`bigsae.splice` against torch's own hooks on the same model, in calls and in generation."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import bigsae
from tests.evaluation.saes import (
    D_SAE,
    MLP_IN,
    MLP_OUT,
    RESIDUAL,
    make_sae,
    residual_sae,
    transcoder,
    write_model,
)

IDS = torch.randint(2, 300, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> PreTrainedModel:
    folder = write_model(tmp_path_factory.mktemp("splice"))
    model = AutoModelForCausalLM.from_pretrained(folder / "lm").eval().requires_grad_(False)
    model.generation_config.pad_token_id = 0
    return model


def hooked(
    model: PreTrainedModel, function: Callable[[Tensor], Tensor], name: str = RESIDUAL, **call: Tensor
) -> Tensor:
    """Logits with the output of a module replaced by a function of it."""
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, out: function(out))
    logits = model(**(call or {"input_ids": IDS})).logits
    handle.remove()
    return logits


def but_first(sae: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda y: torch.cat([y[:, :1], sae(y)[:, 1:]], 1)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "standard", "gated", "batchtopk"])
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_edited_and_the_error_kept_is_the_plain_model(model, architecture, normalize, dtype):
    sae = make_sae(architecture, normalize=normalize)
    model = copy.deepcopy(model).to(dtype)
    plain = model(IDS).logits
    with bigsae.splice(model, sae, RESIDUAL, keep_error=True, first_position=True, edit=lambda z: z * 1):
        assert torch.equal(model(IDS).logits, plain)
    with bigsae.splice(model, sae, RESIDUAL, first_position=True):
        assert not torch.equal(model(IDS).logits, plain)
    assert torch.equal(model(IDS).logits, plain)


@pytest.mark.parametrize("sae", [residual_sae(), make_sae("jumprelu", normalize="layer_norm")])
def test_the_reconstruction(model, sae):
    with bigsae.splice(model, sae, RESIDUAL, first_position=True) as same:
        assert same is model
        found = model(IDS).logits
    assert_close(found, hooked(model, sae))
    with bigsae.splice(model, sae, RESIDUAL):
        found = model(input_ids=IDS).logits
    assert_close(found, hooked(model, but_first(sae)))


def test_the_hookpoint_is_the_saes_own(model):
    sae = residual_sae()
    with bigsae.splice(model, sae):
        found = model(IDS).logits
    assert_close(found, hooked(model, but_first(sae)))
    sae.metadata["hook_name"] = "blocks.0.hook_resid_post"
    with bigsae.splice(model, sae):
        assert torch.equal(model(IDS).logits, found)


@pytest.mark.parametrize("keep_error", [False, True])
def test_edits_come_in_order(model, keep_error):
    sae = residual_sae()
    fired = sae.encode(hooked_activation(model))[:, 1:].flatten(0, 1).sum(0).argsort(descending=True)
    first, second, third = fired[:3].tolist()

    def expected(y: Tensor) -> Tensor:
        latents = sae.encode(y)
        edited = latents * 2
        edited[..., first], edited[..., second] = 0, 7.5
        change = (edited - latents) @ sae.W_dec
        return y + change if keep_error else sae(y) + change

    def double(latents: Tensor) -> Tensor:
        assert latents.shape == (3, 12, D_SAE)
        return latents.mul_(2)  # in place: its own copy

    edits = {"edit": double, "ablate": {first, third}, "steer": {second: 7.5, third: 0.0}}
    fixed = lambda y: but_first(expected)(y)  # noqa: E731
    with bigsae.splice(model, sae, keep_error=keep_error, **edits):
        found = model(IDS).logits

    def with_third(y: Tensor) -> Tensor:
        latents = sae.encode(y)
        return fixed(y) - torch.cat(
            [torch.zeros_like(y[:, :1]), (2 * latents[:, 1:, third, None] * sae.W_dec[third])], 1
        )

    assert_close(found, hooked(model, with_third))
    assert not torch.allclose(found, hooked(model, fixed))


def hooked_activation(model: PreTrainedModel) -> Tensor:
    taken: list[Tensor] = []
    hooked(model, lambda y: taken.append(y) or y)
    return taken[0]


def test_generation_with_and_without_a_cache(model):
    """Each new token comes alone where there is a cache; the same text comes out without one."""
    sae, shapes = residual_sae(), []

    def note(latents: Tensor) -> Tensor:
        shapes.append(tuple(latents.shape[:2]))
        return latents

    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    plain = model.generate(IDS, **options)
    with bigsae.splice(model, sae, edit=note, steer={5: 20.0}):
        steered = model.generate(IDS, **options)
    assert shapes == [(3, 12)] + [(3, 1)] * 5
    with bigsae.splice(model, sae, steer={5: 20.0}):
        without = model.generate(IDS, use_cache=False, **options)
    assert torch.equal(steered, without)
    assert not torch.equal(steered, plain)
    assert torch.equal(model.generate(IDS, **options), plain)


def test_padding_before_the_first_token(model):
    sae = residual_sae()
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), IDS], 1)
    mask = (torch.arange(16) >= 4).long().expand(3, 16)
    with bigsae.splice(model, sae):
        found = model(input_ids=padded, attention_mask=mask).logits[:, 4:]
    call = {"input_ids": padded, "attention_mask": mask}
    expected = hooked(model, lambda y: torch.where((torch.arange(16) == 4)[:, None], y, sae(y)), **call)
    assert_close(found, expected[:, 4:])


def test_a_transcoder_and_an_sae_at_once(model):
    coder, sae, plain = transcoder(), residual_sae(), model(IDS).logits
    read: list[Tensor] = []
    mlp = model.get_submodule(MLP_OUT)
    handles = [
        mlp.register_forward_pre_hook(lambda _, args: read.append(args[0])),
        mlp.register_forward_hook(lambda _, args, out: coder(read[-1])),
    ]
    alone, both = hooked(model, lambda y: y), hooked(model, sae)
    for handle in handles:
        handle.remove()
    with bigsae.splice(model, coder, first_position=True):
        assert_close(model(IDS).logits, alone)
        with bigsae.splice(model, sae, first_position=True):
            assert_close(model(IDS).logits, both)
        assert_close(model(IDS).logits, alone)
    with bigsae.splice(model, coder, MLP_IN, output_hookpoint=MLP_OUT, keep_error=True, first_position=True):
        assert torch.equal(model(IDS).logits, plain)
    assert not torch.allclose(alone, both)


def test_gradients_pass(model):
    sae = make_sae("standard")
    embedded = model.get_input_embeddings()(IDS)
    gradients = []

    def changed(y: Tensor) -> Tensor:
        return y + (2 * sae.encode(y).detach() - sae.encode(y)) @ sae.W_dec

    for is_ours in (True, False):
        x = embedded.clone().requires_grad_()
        if is_ours:
            with bigsae.splice(model, sae, RESIDUAL, keep_error=True, edit=lambda z: 2 * z.detach()):
                logits = model(inputs_embeds=x).logits
        else:
            logits = hooked(model, but_first(changed), inputs_embeds=x)
        logits.square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5 * gradients[1].abs().max().item())


def test_what_is_refused(model):
    sae, plain = residual_sae(), model(IDS).logits
    with pytest.raises(bigsae.UserError, match=r"no module .* nearest"), bigsae.splice(model, sae, "model.x"):
        pass
    with pytest.raises(bigsae.UserError, match="does not say which"), bigsae.splice(model, make_sae()):
        pass
    with pytest.raises(ValueError, match=f"no latent {D_SAE}"), bigsae.splice(model, sae, ablate=[D_SAE]):
        pass
    not_for_saes = bigsae.splice(model, sae, output_hookpoint=MLP_OUT)
    with pytest.raises(ValueError, match="for transcoders"), not_for_saes:
        pass
    with bigsae.splice(model, sae, "lm_head"), pytest.raises(ValueError, match="wide"):
        model(IDS)
    with bigsae.splice(model, sae, edit=lambda z: z[..., :-1]), pytest.raises(ValueError, match="edit gave"):
        model(IDS)
    assert torch.equal(model(IDS).logits, plain), "an error leaves the model as it was"
    assert "forward" not in vars(model)
