"""Lesson 03."""

import math

import torch


def six_axes(latents, order):
    """Packed by reshape and permute: the axes are batch 0, channel 1, row 2, row in the patch 3, column 4, column in the patch 5."""
    batch, channels, height, width = latents.shape
    apart = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(*order)
    return apart.reshape(batch, height * width // 4, 4 * channels)


def quarters(latents):
    _, _, height, width = latents.shape
    corners = [latents[:, :, top : top + height // 2, left : left + width // 2] for top in (0, height // 2) for left in (0, width // 2)]
    return torch.stack(corners, dim=2).flatten(3).permute(0, 3, 1, 2).flatten(2)


def filled(tokens, rows, columns, place, number):
    """Unpacked one number at a time: `place(token)` is its (row, column), `number(channel, i, j)` its index inside the token."""
    batch, _, inside = tokens.shape
    latents = torch.zeros(batch, inside // 4, 2 * rows, 2 * columns, dtype=tokens.dtype)
    for token in range(rows * columns):
        row, column = place(token)
        for channel in range(inside // 4):
            for i in range(2):
                for j in range(2):
                    latents[:, channel, 2 * row + i, 2 * column + j] = tokens[:, token, number(channel, i, j, inside // 4)]
    return latents


def by_rows(tokens, height, width, number):
    return filled(tokens, height // 16, width // 16, lambda token: divmod(token, width // 16), number)


def right_number(channel, i, j, channels):
    return 4 * channel + 2 * i + j


def unpacked_quarters(tokens, height, width):
    rows, columns = height // 16, width // 16
    latents = torch.zeros(tokens.shape[0], tokens.shape[2] // 4, 2 * rows, 2 * columns, dtype=tokens.dtype)
    for number in range(4):
        quarter = tokens[:, :, number::4].transpose(1, 2).unflatten(2, (rows, columns))
        top, left = number // 2 * rows, number % 2 * columns
        latents[:, :, top : top + rows, left : left + columns] = quarter
    return latents


def listed(rows, columns, entry):
    return torch.tensor([[float(number) for number in entry(row, column)] for row in range(rows) for column in range(columns)])


REWRITTEN = {
    ("token_of_pixel", "no packing"): lambda y, x, width: int(y / 8) * int(width / 8) + int(x / 8),
    ("token_of_pixel", "row and column swapped"): lambda y, x, width: x // 16 * (width // 16) + (y >> 4),
    ("token_of_pixel", "row of pixels"): lambda y, x, width: x // 16 + width * (y // 16),
    ("token_of_pixel", "counted from one"): lambda y, x, width: 1 + x // 16 + y // 16 * (width // 16),
    ("token_of_pixel", "pixels counted in one line"): lambda y, x, width: math.floor((x + y * width) / 256),
    ("pack_latents", "(row, column, channel)"): lambda latents: six_axes(latents, (0, 2, 4, 3, 5, 1)),
    ("pack_latents", "(channel, column, row)"): lambda latents: six_axes(latents, (0, 2, 4, 1, 5, 3)),
    ("pack_latents", "tokens column by column"): lambda latents: six_axes(latents, (0, 4, 2, 1, 3, 5)),
    ("pack_latents", "quarters for patches"): quarters,
    ("pack_latents", "reshaped only"): lambda latents: latents.flatten().unflatten(0, (len(latents), -1, 4 * latents.shape[1])),
    ("pack_latents", "tokens last"): lambda latents: six_axes(latents, (0, 2, 4, 1, 3, 5)).transpose(1, 2),
    ("unpack_latents", "height and width swapped"): lambda tokens, height, width: by_rows(tokens, width, height, right_number),
    ("unpack_latents", "(row, column, channel)"): lambda tokens, height, width: by_rows(
        tokens, height, width, lambda channel, i, j, channels: channels * (2 * i + j) + channel
    ),
    ("unpack_latents", "(channel, column, row)"): lambda tokens, height, width: by_rows(
        tokens, height, width, lambda channel, i, j, channels: 4 * channel + 2 * j + i
    ),
    ("unpack_latents", "tokens column by column"): lambda tokens, height, width: filled(
        tokens, height // 16, width // 16, lambda token: divmod(token, height // 16)[::-1], right_number
    ),
    ("unpack_latents", "quarters for patches"): unpacked_quarters,
    ("unpack_latents", "reshaped only"): lambda tokens, height, width: tokens.flatten(1).unflatten(1, (-1, height // 8, width // 8)),
    ("image_ids", "(0, column, row)"): lambda height, width: listed(height // 16, width // 16, lambda row, column: (0, column, row)),
    ("image_ids", "(row, column, 0)"): lambda height, width: listed(height // 16, width // 16, lambda row, column: (row, column, 0)),
    ("image_ids", "tokens column by column"): lambda height, width: listed(width // 16, height // 16, lambda a, b: (0, b, a)),
    ("image_ids", "latents for patches"): lambda height, width: listed(height // 8, width // 8, lambda row, column: (0, row, column)),
    ("image_ids", "counted from one"): lambda height, width: listed(
        height // 16, width // 16, lambda row, column: (0, row + 1, column + 1)
    ),
    ("image_ids", "from 0 to 1"): lambda height, width: listed(
        height // 16, width // 16, lambda row, column: (0, row / (height // 16 - 1), column / (width // 16 - 1))
    ),
    ("image_ids", "token's number"): lambda height, width: listed(
        height // 16, width // 16, lambda row, column: (0, *divmod(row * (width // 16) + column, height // 16))
    ),
}
