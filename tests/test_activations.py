"""instruments.activations: bytes alive, counted by hand on a few operations and on the transformer."""

import pytest
import torch
from test_instruments import TINY

from flux_lab.instruments import MINIATURE, on_meta
from flux_lab.instruments.activations import LiveBytes, peak_activations
from flux_lab.instruments.side_by_side import empty_inputs

FLOAT32 = 4


def test_what_is_let_go_no_longer_counts() -> None:
    given = torch.zeros(10)
    with LiveBytes([given]) as live:
        first = given + 1
        second = first * 2
        assert live.now == 2 * 10 * FLOAT32
        del first
        assert live.now == 10 * FLOAT32
        second = second[:5] - 1
        assert live.now == 5 * FLOAT32
    assert live.peak == 2 * 10 * FLOAT32
    assert second.shape == (5,)


def test_views_and_known_tensors_take_nothing() -> None:
    given = torch.zeros(4, 6)
    with LiveBytes([given]) as live:
        views = given.T, given[1:], given.view(24)
    assert live.peak == 0
    assert len(views) == 3


@pytest.mark.parametrize("fused", [True, False])
def test_one_block_of_each_kind_has_the_peak_of_all(fused: bool) -> None:
    model, inputs = on_meta("transformer", TINY), empty_inputs(TINY)
    if fused:
        for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
            block.attn.attend.forward = lambda query, key, value: torch.empty_like(query)
    with torch.no_grad(), LiveBytes([*model.parameters(), *(tensor for tensor in inputs.values() if tensor is not None)]) as live:
        model(**inputs)
    assert peak_activations(TINY, torch.float32, fused) == live.peak


def test_a_fused_product_saves_the_matrix_of_probabilities() -> None:
    sequence, heads = MINIATURE.tokens + MINIATURE.length, MINIATURE.transformer.num_attention_heads
    written_out, fused = (peak_activations(MINIATURE, torch.float32, each) for each in (False, True))
    assert written_out - fused > 0
    assert written_out >= heads * sequence**2 * FLOAT32
    assert peak_activations(MINIATURE, torch.bfloat16) < fused
