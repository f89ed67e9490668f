"""Which mesh is chosen, and that the reason's numbers are those that decided."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bigsae.parallel.choose import Choice, choose_latent, step_shape
from bigsae.parallel.memory import SAEShape, all_bytes, sae_bytes
from bigsae.parallel.traffic import sent_bytes, step_payloads

WIDE = SAEShape(d_in=4096, d_sae=131_072, d_out=4096, k=64)
NARROW = SAEShape(d_in=512, d_sae=1024, d_out=512, k=32)
BATCH = 16_384


def sent(sae: SAEShape, num_ranks: int, num_latent: int, batch: int = BATCH) -> float:
    shape = step_shape(sae, num_ranks, num_latent, batch, False, 4)
    sizes = {"data": shape.num_data, "latent": num_latent}
    return sum(sent_bytes(payload, sizes[payload.group]) for payload in step_payloads(shape))


def needs(sae: SAEShape, num_ranks: int, num_latent: int) -> int:
    return all_bytes([sae_bytes(sae, num_latent, num_ranks // num_latent, BATCH)])


def test_one_rank_holds_all():
    assert choose_latent([WIDE], 1, 1, BATCH, None) == Choice(1, "latent 1: there is one rank")


def test_the_mesh_that_sends_least_is_taken():
    for sae, batch in ((WIDE, BATCH), (NARROW, BATCH), (replace(NARROW, d_sae=8192), 2048)):
        choice = choose_latent([sae], 8, 8, batch, None)
        assert choice.num_latent == min((1, 2, 4, 8), key=lambda n: sent(sae, 8, n, batch))


def test_a_wide_one_is_spread_and_a_narrow_one_copied():
    assert choose_latent([WIDE], 8, 8, BATCH, None).num_latent == 8
    assert choose_latent([NARROW], 8, 8, BATCH, None).num_latent == 1


def test_latents_stay_within_a_node_where_they_fit():
    assert choose_latent([WIDE], 64, 8, BATCH, None).num_latent == 8


def test_what_does_not_divide_every_width_is_left_out():
    odd = replace(WIDE, d_sae=131_072 + 2)
    assert choose_latent([WIDE, odd], 8, 8, BATCH, None).num_latent == 2


def test_ranks_of_a_node_that_latents_do_not_divide():
    """Of 12 ranks, six a node, two hold one and not four, though fewer than a node: a group would lie on two nodes."""
    assert WIDE.d_sae % 3
    assert sent(WIDE, 12, 4) < sent(WIDE, 12, 2)
    assert choose_latent([WIDE], 12, 6, BATCH, None).num_latent == 2


def test_memory_excludes_what_would_send_less():
    """Twenty that step one after the other: each is best copied to all ranks, but so many copies are too much."""
    saes = [NARROW] * 20

    def all_need(num_latent: int) -> int:
        return all_bytes([sae_bytes(sae, num_latent, 8 // num_latent, BATCH) for sae in saes])

    assert choose_latent(saes, 8, 8, BATCH, all_need(1)).num_latent == 1
    tight = choose_latent(saes, 8, 8, BATCH, all_need(1) - 1)
    assert tight.num_latent == 2
    assert "but latent 1 would need" in tight.reason


def test_beyond_a_node_where_no_node_holds_it():
    memory = needs(WIDE, 64, 16)
    assert memory < needs(WIDE, 64, 8)
    choice = choose_latent([WIDE], 64, 8, BATCH, memory)
    assert choice.num_latent == 16
    assert choice.reason.startswith("latent 16, over several nodes: latent 8 would need")


def test_the_largest_where_nothing_fits():
    choice = choose_latent([WIDE], 64, 8, BATCH, 2**20)
    assert choice.num_latent == 64
    assert choice.reason.startswith("nothing fits: latent 64 would need")


def test_the_reason_names_what_each_mesh_sends():
    choice = choose_latent([WIDE], 8, 8, BATCH, None)
    assert f"moves {sent(WIDE, 8, 8) / 1e9:,.1f} GB" in choice.reason
    assert f"latent 1 would move {sent(WIDE, 8, 1) / 1e9:,.1f} GB" in choice.reason


@pytest.mark.parametrize("num_latent", [1, 2, 8])
def test_a_rank_s_part_of_weights_and_moments(num_latent):
    """The formula of docs/plan.md, spelled out once more."""
    rows = WIDE.d_sae // num_latent
    used = sae_bytes(WIDE, num_latent, 8 // num_latent, BATCH)
    assert used.weights == 4 * (2 * rows * 4096 + rows + 4096)
    assert used.moments == 2 * used.weights
    assert used.gradients == used.weights
    shared = sae_bytes(WIDE, num_latent, 8 // num_latent, BATCH, shard_optimizer=True)
    assert shared.moments == pytest.approx(2 * 4 * (2 * WIDE.d_sae * 4096) / 8, rel=1e-3)


def test_int8_moments_have_a_scale_for_each_256_values():
    used = sae_bytes(replace(WIDE, moments_dtype="int8"), 1, 1, BATCH)
    matrices = 2 * WIDE.d_sae * 4096
    vectors = WIDE.d_sae + 4096
    assert used.moments == 2 * (matrices + 4 * matrices // 256) + 2 * 4 * vectors
    odd = sae_bytes(replace(WIDE, d_in=300, d_out=300, moments_dtype="int8"), 1, 1, BATCH)
    assert odd.moments == 2 * 2 * WIDE.d_sae * (300 + 4 * 2) + 2 * 4 * (WIDE.d_sae + 300)
