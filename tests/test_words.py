"""instruments.words: the right part of the attention matrix, in the right order."""

import pytest
import torch

from flux_lab.instruments.words import attention_between, word_map
from flux_lab.shapes import ShapeError

LENGTH, ROWS, COLUMNS = 3, 2, 5


@pytest.fixture
def probabilities():
    return torch.randn(4, LENGTH + ROWS * COLUMNS, LENGTH + ROWS * COLUMNS).softmax(dim=-1)


def test_word_map_is_what_each_image_token_gives_to_the_word(probabilities):
    seen = word_map(probabilities, 1, LENGTH, ROWS, COLUMNS)
    for row in range(ROWS):
        for column in range(COLUMNS):
            expected = sum(probabilities[head, LENGTH + row * COLUMNS + column, 1] for head in range(4)) / 4
            torch.testing.assert_close(seen[row, column], expected)


def test_shares_of_all_groups_make_one(probabilities):
    groups = {"first": slice(0, 1), "other text": slice(1, LENGTH), "image": slice(LENGTH, None)}
    for queries in (slice(0, LENGTH), slice(LENGTH, None)):
        shares = attention_between(probabilities, queries, groups)
        assert list(shares) == list(groups)
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["first"] == pytest.approx(probabilities[:, queries, 0].mean().item())


def test_bad_arguments_are_refused(probabilities):
    with pytest.raises(ValueError, match="token: expected a text token, 0 to 2, got 3"):
        word_map(probabilities, 3, LENGTH, ROWS, COLUMNS)
    with pytest.raises(ValueError, match="rows, columns: expected 10 image tokens, got 3 x 3 = 9"):
        word_map(probabilities, 0, LENGTH, 3, 3)
    with pytest.raises(ShapeError, match="word_map: argument `probabilities`"):
        word_map(probabilities[:, LENGTH:], 0, LENGTH, ROWS, COLUMNS)
