"""Every activation leaves the buffer once, in a seeded order that a checkpoint keeps."""

from __future__ import annotations

import torch

from bigsae.data.buffer import ActivationBuffer

CPU = torch.device("cpu")


def make_buffer(seed: int = 0, rank: int = 0) -> ActivationBuffer:
    return ActivationBuffer({"a": 2, "b": 3}, 100, 20, torch.float32, CPU, seed, rank)


def numbered(start: int, count: int) -> dict[str, torch.Tensor]:
    """Activations that say which they are."""
    numbers = torch.arange(start, start + count).float()[:, None]
    return {"a": numbers.expand(-1, 2), "b": -numbers.expand(-1, 3)}


def run(buffer: ActivationBuffer, writes: int, start: int = 0) -> list[int]:
    """Fill and half-empty the buffer `writes` times; returns what was read, in order."""
    out = []
    for _ in range(writes):
        while buffer.num_waiting < buffer.capacity:
            buffer.write(numbered(start, 13))
            start += 13
        buffer.shuffle()
        while buffer.num_unread >= 50:
            batch = buffer.read(7)
            assert torch.equal(batch["a"][:, 0], -batch["b"][:, 2])
            out += batch["a"][:, 0].int().tolist()
    return out


def test_each_leaves_once_in_a_seeded_order():
    buffer = make_buffer()
    out = run(buffer, 8)
    rest = buffer.read(buffer.num_unread)["a"][:, 0].int().tolist()
    assert sorted(out + rest) == list(range(len(out) + len(rest)))
    assert out != sorted(out)
    assert out == run(make_buffer(), 8)
    assert out != run(make_buffer(seed=1), 8)
    assert out != run(make_buffer(rank=1), 8)


def test_peek_leaves_them_unread():
    buffer = make_buffer()
    buffer.write(numbered(0, 20))
    buffer.shuffle()
    assert torch.equal(buffer.peek(5)["a"], buffer.read(5)["a"])
    assert buffer.num_unread == 15


def test_going_on_from_a_checkpoint_reads_the_same():
    """Also from within a refill, when some activations wait for the next shuffle."""
    straight = make_buffer()
    run(straight, 3)
    straight.write(numbered(1000, 13))
    counters = straight.counters()
    assert counters["num_new"] == 13
    saved = {name: t.clone() for name, t in straight.tensors().items()}

    resumed = make_buffer()
    resumed._generator.manual_seed(99)
    into = resumed.empty_tensors(counters)
    for name, tensor in into.items():
        tensor.copy_(saved[name])
    resumed.load(into, counters)
    assert run(resumed, 4, start=2000) == run(straight, 4, start=2000)


def test_half_precision_is_kept_as_given():
    buffer = ActivationBuffer({"a": 4}, 10, 5, torch.bfloat16, CPU, 0, 0)
    x = torch.randn(5, 4)
    buffer.write({"a": x})
    buffer.shuffle()
    read = buffer.read(5)["a"]
    assert read.dtype == torch.bfloat16
    assert torch.equal(read.float().sort(0).values, x.bfloat16().float().sort(0).values)
    assert buffer.num_bytes() == 15 * 4 * 2
