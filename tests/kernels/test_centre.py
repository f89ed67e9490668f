import pytest
import torch

from bigsae.kernels.centre import centre


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_subtracting_it_from_each_token(device, dtype):
    """Of a loss that is not linear in the pre-activations, with two uses of them; small integers: sums are exact."""
    shapes = ((9, 6), (20, 6), (20,), (6,))
    x, *values = (torch.randint(-3, 4, s, device=device).to(dtype) for s in shapes)
    found, expected = ([v.clone().requires_grad_() for v in values] for _ in range(2))

    def loss(centred: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor) -> torch.Tensor:
        pre_acts = centred @ W_enc.T + b_enc
        return pre_acts.relu().square().sum() + 2 * (centred @ W_enc[3:5].T + b_enc[3:5]).sum()

    W_enc, b_enc, b_dec = found
    centred, bias = centre(x, W_enc, b_enc, b_dec)
    assert torch.equal(centred, x - b_dec) and not centred.requires_grad
    assert torch.equal(bias, b_enc)
    (loss(centred, W_enc, bias) + b_dec.sum()).backward()
    W_enc, b_enc, b_dec = expected
    (loss(x - b_dec, W_enc, b_enc) + b_dec.sum()).backward()
    for tensor, reference in zip(found, expected, strict=True):
        assert tensor.grad is not None and reference.grad is not None
        assert torch.equal(tensor.grad, reference.grad)


def test_a_bias_of_the_decoder_without_gradient(device):
    x, W_enc, b_dec = (torch.randn(*s, device=device) for s in ((9, 6), (20, 6), (6,)))
    b_enc = torch.zeros(20, device=device).requires_grad_()
    _, bias = centre(x, W_enc, b_enc, b_dec)
    bias.sum().backward()
    assert b_dec.grad is None and b_enc.grad is not None and torch.equal(b_enc.grad, torch.ones_like(b_enc))


def test_an_encoder_s_bias_without_gradient(device):
    """In the dtypes of a bfloat16 encoder."""
    x, W_enc, b_enc = (torch.randn(*s, device=device).bfloat16() for s in ((9, 6), (20, 6), (20,)))
    b_dec = torch.zeros(6, device=device).requires_grad_()
    _, bias = centre(x, W_enc, b_enc, b_dec)
    bias.sum().backward()
    assert b_dec.grad is not None and b_dec.grad.dtype == torch.float32
    torch.testing.assert_close(b_dec.grad, -W_enc.float().sum(0), rtol=1e-2, atol=1e-2)


def test_tokens_that_want_a_gradient(device):
    x, W_enc, b_enc, b_dec = (torch.randn(*s, device=device) for s in ((9, 6), (20, 6), (20,), (6,)))
    with pytest.raises(ValueError, match="detach x"):
        centre(x.requires_grad_(), W_enc, b_enc, b_dec)
    with torch.no_grad():
        centre(x, W_enc, b_enc, b_dec)
