"""The exercises of lesson 03."""

from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from flux_lab import latents as package
from flux_lab.exercises.checking import Exercise, Misconception
from flux_lab.latents import PATCH

SCALE = 8  # pixels for each latent, along one side
SIDE = SCALE * PATCH  # pixels for each token, along one side
SIZES = ((1, 16, 4, 6), (2, 3, 6, 4), (1, 5, 8, 6))  # latents: batch, channels, height, width
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
PATCHES = {"p_row": PATCH, "p_column": PATCH}


# ---- the token of a pixel -----------------------------------------------------------------------------------------------


def token_of_pixel(y: int, x: int, width: int) -> int:
    """The number of the token that holds the pixel at row `y` and column `x` of an image of `width` pixels."""
    return (y // SIDE) * (width // SIDE) + x // SIDE


def pixels() -> Iterator[dict[str, int]]:
    for y, x, width in ((0, 0, 128), (40, 100, 128), (127, 3, 512), (200, 777, 1360), (1023, 1023, 1024), (17, 400, 1024)):
        yield {"y": y, "x": x, "width": width}


TOKEN_OF_PIXEL = Exercise(
    name="token_of_pixel",
    reference=token_of_pixel,
    cases=pixels,
    misconceptions=(
        Misconception(
            "no packing",
            lambda y, x, width: (y // SCALE) * (width // SCALE) + x // SCALE,
            "you counted latents, which are 8 pixels wide. A token is a patch of 2 x 2 latents: 16 pixels",
        ),
        Misconception(
            "row and column swapped",
            lambda y, x, width: (x // SIDE) * (width // SIDE) + y // SIDE,
            "row and column are swapped. Whole rows of tokens come before this one: y tells how many",
        ),
        Misconception(
            "row of pixels",
            lambda y, x, width: (y // SIDE) * width + x // SIDE,
            "you passed over `width` tokens for every row of tokens. A row has as many tokens as fit into the width, width // 16",
        ),
        Misconception(
            "counted from one",
            lambda y, x, width: (y // SIDE) * (width // SIDE) + x // SIDE + 1,
            "you counted from 1. The first token has the number 0",
        ),
        Misconception(
            "pixels counted in one line",
            lambda y, x, width: (y * width + x) // SIDE**2,
            "you divided the pixel's number by 256. The 256 pixels of a token lie in 16 rows, not in one line",
        ),
    ),
)


# ---- packing ------------------------------------------------------------------------------------------------------------


def pack_latents(latents: Tensor) -> Tensor:
    """Latents [batch, channels, height, width] as tokens [batch, height/2 * width/2, channels * 4]."""
    return package.pack_latents(latents)


def packed_as(latents: Tensor, tokens: str = "rows columns", inside: str = "channels p_row p_column") -> Tensor:
    """Pack with the tokens, and the numbers inside a token, in another order."""
    return rearrange(latents, f"batch channels (rows p_row) (columns p_column) -> batch ({tokens}) ({inside})", **PATCHES)


def some_latents() -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for size, dtype in zip(SIZES, DTYPES, strict=True):
        yield {"latents": torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)}


PACK_LATENTS = Exercise(
    name="pack_latents",
    reference=pack_latents,
    cases=some_latents,
    misconceptions=(
        Misconception(
            "(row, column, channel)",
            lambda latents: packed_as(latents, inside="p_row p_column channels"),
            "you packed (row, column, channel): all channels of the upper left latent first. The channel comes first: of each channel all"
            " four latents",
        ),
        Misconception(
            "(channel, column, row)",
            lambda latents: packed_as(latents, inside="channels p_column p_row"),
            "you packed (channel, column, row): inside a patch you go down before you go right. It is read row by row",
        ),
        Misconception(
            "tokens column by column",
            lambda latents: packed_as(latents, tokens="columns rows"),
            "the numbers inside each token are right, but the tokens come column by column. The picture is read row by row",
        ),
        Misconception(
            "quarters for patches",
            lambda latents: rearrange(
                latents, "batch channels (p_row rows) (p_column columns) -> batch (rows columns) (channels p_row p_column)", **PATCHES
            ),
            "each of your tokens takes one number from each quarter of the picture. In a pattern such as (rows p_row) the part that"
            " changes fastest stands last: four neighbours make a patch",
        ),
        Misconception(
            "reshaped only",
            lambda latents: latents.reshape(latents.shape[0], latents.shape[2] * latents.shape[3] // PATCH**2, latents.shape[1] * PATCH**2),
            "you only gave the numbers another shape. They must also change places: reshape into six axes, permute, then reshape",
        ),
        Misconception(
            "tokens last",
            lambda latents: rearrange(packed_as(latents), "batch tokens patch_channels -> batch patch_channels tokens"),
            "the two last axes are swapped: expected [batch, tokens, numbers of a token]",
        ),
    ),
)


# ---- unpacking ----------------------------------------------------------------------------------------------------------


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens [batch, tokens, channels * 4] of an image of `height` x `width` pixels as latents, 8 times smaller."""
    return package.unpack_latents(tokens, height, width)


def unpacked_as(
    tokens: Tensor, rows: int, columns: int, order: str = "rows columns", inside: str = "channels p_row p_column", to: str | None = None
) -> Tensor:
    """Unpack as if the tokens, or the numbers inside a token, were in another order."""
    to = to or "(rows p_row) (columns p_column)"
    return rearrange(tokens, f"batch ({order}) ({inside}) -> batch channels {to}", rows=rows, columns=columns, **PATCHES)


def some_tokens() -> Iterator[dict[str, Any]]:
    for case in some_latents():
        height, width = (side * SCALE for side in case["latents"].shape[2:])
        yield {"tokens": package.pack_latents(case["latents"]), "height": height, "width": width}


UNPACK_LATENTS = Exercise(
    name="unpack_latents",
    reference=unpack_latents,
    cases=some_tokens,
    misconceptions=(
        Misconception(
            "height and width swapped",
            lambda tokens, height, width: unpacked_as(tokens, width // SIDE, height // SIDE),
            "height and width are swapped. The result has the shape of a picture on its side, and its rows break at wrong places",
        ),
        Misconception(
            "(row, column, channel)",
            lambda tokens, height, width: unpacked_as(tokens, height // SIDE, width // SIDE, inside="p_row p_column channels"),
            "you read a token as (row, column, channel). It holds (channel, row, column): four numbers for each channel",
        ),
        Misconception(
            "(channel, column, row)",
            lambda tokens, height, width: unpacked_as(tokens, height // SIDE, width // SIDE, inside="channels p_column p_row"),
            "every patch is turned over: you read it column by column. The second number belongs to the right of the first, not below it",
        ),
        Misconception(
            "tokens column by column",
            lambda tokens, height, width: unpacked_as(tokens, height // SIDE, width // SIDE, order="columns rows"),
            "you put the tokens down column by column. They come row by row",
        ),
        Misconception(
            "quarters for patches",
            lambda tokens, height, width: unpacked_as(tokens, height // SIDE, width // SIDE, to="(p_row rows) (p_column columns)"),
            "you put the four numbers of a patch into four quarters of the picture. They are neighbours",
        ),
        Misconception(
            "reshaped only",
            lambda tokens, height, width: tokens.reshape(tokens.shape[0], tokens.shape[2] // PATCH**2, height // SCALE, width // SCALE),
            "you only gave the numbers another shape. They must also change places: reshape into six axes, permute, then reshape",
        ),
    ),
)


# ---- position ids -------------------------------------------------------------------------------------------------------


def image_ids(height: int, width: int) -> Tensor:
    """The position ids (0, row, column) of the tokens of an image of `height` x `width` pixels, float32 [tokens, 3]."""
    return package.prepare_latent_image_ids(height // SIDE, width // SIDE)


def grid_ids(rows: int, columns: int, axes: tuple[int, int, int] = (0, 1, 2), order: str = "rows columns") -> Tensor:
    """Ids of a grid, with their three numbers or their tokens in another order."""
    ids = rearrange(package.prepare_latent_image_ids(rows, columns), "(rows columns) axes -> rows columns axes", rows=rows)
    return rearrange(ids[:, :, list(axes)], f"rows columns axes -> ({order}) axes")


def ids_by_number_of_rows(height: int, width: int) -> Tensor:
    """Row and column by dividing the token's number by the number of rows, where it must be that of columns."""
    rows, columns = height // SIDE, width // SIDE
    number = torch.arange(rows * columns)
    return torch.stack([torch.zeros_like(number), number // rows, number % rows], dim=1).float()


def sizes() -> Iterator[dict[str, int]]:
    for height, width in ((128, 128), (96, 128), (256, 64), (1024, 768)):
        yield {"height": height, "width": width}


IMAGE_IDS = Exercise(
    name="image_ids",
    reference=image_ids,
    cases=sizes,
    misconceptions=(
        Misconception(
            "(0, column, row)",
            lambda height, width: grid_ids(height // SIDE, width // SIDE, axes=(0, 2, 1)),
            "you wrote (0, column, row). The row comes first, as in a matrix",
        ),
        Misconception(
            "(row, column, 0)",
            lambda height, width: grid_ids(height // SIDE, width // SIDE, axes=(1, 2, 0)),
            "you wrote (row, column, 0). The unused number is the first",
        ),
        Misconception(
            "tokens column by column",
            lambda height, width: grid_ids(height // SIDE, width // SIDE, order="columns rows"),
            "every id is there, but the tokens come column by column. They must come in the order of `pack_latents`: row by row",
        ),
        Misconception(
            "latents for patches",
            lambda height, width: grid_ids(height // SCALE, width // SCALE),
            "you numbered the latents. Ids count patches of 2 x 2 latents: 16 pixels each way",
        ),
        Misconception(
            "counted from one",
            lambda height, width: grid_ids(height // SIDE, width // SIDE) + torch.tensor([0.0, 1.0, 1.0]),
            "you counted from 1. The upper left token has the id (0, 0, 0)",
        ),
        Misconception(
            "from 0 to 1",
            lambda height, width: (
                grid_ids(height // SIDE, width // SIDE) / torch.tensor([1.0, max(height // SIDE - 1, 1), max(width // SIDE - 1, 1)])
            ),
            "you scaled the ids to 0 ... 1, as if they were colours. They count: a larger picture has larger ids",
        ),
        Misconception(
            "token's number",
            ids_by_number_of_rows,
            "you divided the token's number by the number of rows. A new row begins after as many tokens as there are columns",
        ),
    ),
)

EXERCISES = (TOKEN_OF_PIXEL, PACK_LATENTS, UNPACK_LATENTS, IMAGE_IDS)
