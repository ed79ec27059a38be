"""Latents and tokens: noise to start from, 2x2 patches packed into tokens and back, and the position ids of the tokens."""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from flux_lab.shapes import shaped

PATCH = 2


@shaped
def pack_latents(latents: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens patch_channels"]:
    """Cut latents into 2x2 patches and make each a token.

    `tokens` = height/2 * width/2 in row-major order; inside a token the order is (channel, patch row, patch column).
    Raises ValueError when height or width is odd. Source: diffusers `FluxPipeline._pack_latents`.
    """
    *_, height, width = latents.shape
    if height % PATCH or width % PATCH:
        raise ValueError(f"pack_latents: height and width of the latents must be even, got {height} x {width}")
    return rearrange(
        latents,
        "batch channels (rows p_row) (columns p_column) -> batch (rows columns) (channels p_row p_column)",
        p_row=PATCH,
        p_column=PATCH,
    )


@shaped
def unpack_latents(
    tokens: Float[Tensor, "batch tokens patch_channels"], height: int, width: int, vae_scale_factor: int = 8
) -> Float[Tensor, "batch channels rows columns"]:
    """The inverse of `pack_latents`.

    `height` and `width` are those of the *image*, in pixels, as upstream has it; latents are `vae_scale_factor` times smaller.
    Raises ValueError when the number of tokens does not fit. Source: diffusers `FluxPipeline._unpack_latents`.
    """
    rows, columns = height // (vae_scale_factor * PATCH), width // (vae_scale_factor * PATCH)
    if tokens.shape[1] != rows * columns:
        raise ValueError(
            f"unpack_latents: an image of {height} x {width} pixels has {rows} x {columns} = {rows * columns} tokens, got {tokens.shape[1]}"
        )
    return rearrange(
        tokens,
        "batch (rows columns) (channels p_row p_column) -> batch channels (rows p_row) (columns p_column)",
        rows=rows,
        columns=columns,
        p_row=PATCH,
        p_column=PATCH,
    )


@shaped
def prepare_latent_image_ids(
    rows: int, columns: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Float[Tensor, "tokens 3"]:
    """Position ids (unused, row, column) of `rows * columns` tokens, row-major. Text tokens have (0, 0, 0).

    `rows` and `columns` count 2x2 patches, not latents. In bf16 whole numbers are exact only up to 256, so pictures of more than
    256 patches (4096 pixels) a side get repeated ids: so it is upstream. Source: diffusers `FluxPipeline._prepare_latent_image_ids`.
    """
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    ids = torch.stack([torch.zeros_like(row), row, column], dim=-1)
    return rearrange(ids, "rows columns axes -> (rows columns) axes").to(device=device, dtype=dtype)


def prepare_noise(
    shape: tuple[int, int, int, int],
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "batch channels height width"]:
    """Standard normal latents of `shape`, drawn in `dtype`.

    A CPU generator draws on the CPU whatever `device` is, so that a seed gives the same picture everywhere. With a list of
    generators, one a picture, each picture depends only on its own. Raises ValueError when the list's length is not the batch's,
    TypeError for what is no generator.
    Source: diffusers `randn_tensor`.
    """
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(f"generator: a list of {len(generator)} generators for a batch of {shape[0]}, expected one each")
        return torch.cat([prepare_noise((1, *shape[1:]), each, dtype, device) for each in generator])
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"generator: expected a torch.Generator or a list of them, got {type(generator).__name__}")
    drawn_on = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, dtype=dtype, device=drawn_on).to(device)
