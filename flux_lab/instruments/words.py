"""Where in the picture a word is looked at, read off attention's probabilities."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from flux_lab.shapes import shaped


@shaped
def word_map(
    probabilities: Float[Tensor, "heads sequence sequence"], token: int, length: int, rows: int, columns: int
) -> Float[Tensor, "rows columns"]:
    """The share of its attention that every image token gives to the text token `token`, averaged over heads.

    Of a sequence the first `length` tokens are text, the others image, row by row. Raises ValueError for a token that is not text, and
    for rows and columns that are not those of the picture.
    """
    tokens = probabilities.shape[1] - length
    if not 0 <= token < length:
        raise ValueError(f"token: expected a text token, 0 to {length - 1}, got {token}")
    if rows * columns != tokens:
        raise ValueError(f"rows, columns: expected {tokens} image tokens, got {rows} x {columns} = {rows * columns}")
    return rearrange(probabilities[:, length:, token].mean(dim=0), "(rows columns) -> rows columns", rows=rows)


@shaped
def attention_between(
    probabilities: Float[Tensor, "heads sequence sequence"], queries: slice, groups: dict[str, slice]
) -> dict[str, float]:
    """How the tokens of `queries` divide their attention among named groups of tokens, on average over tokens and heads."""
    asked = probabilities[:, queries]
    return {name: asked[:, :, keys].sum(dim=2).mean().item() for name, keys in groups.items()}
