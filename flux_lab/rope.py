"""Rotary position embedding on three axes: position turns pairs of channels of every query and key.

The score of a query and a key then depends on the difference of their positions. FLUX.1 splits a head's 128 channels into 16 for
the first (unused) number of a position id, 56 for the row and 56 for the column. Source: RoFormer (Su et al. 2021,
arXiv 2104.09864, equation 34), diffusers `FluxPosEmbed` and `apply_rotary_emb`.
"""

import torch
from einops import rearrange, repeat
from jaxtyping import Complex, Float
from torch import Tensor, nn

from flux_lab.shapes import shaped


@shaped
def get_1d_rotary_pos_embed(
    dim: int, pos: Float[Tensor, "sequence"], theta: float = 10000.0, use_real: bool = True, freqs_dtype: torch.dtype = torch.float64
) -> tuple[Float[Tensor, "sequence dim"], Float[Tensor, "sequence dim"]] | Complex[Tensor, "sequence pairs"]:
    """Angles pos * theta^(-2i/dim) for i = 0 ... dim/2 - 1, as (cos, sin) with every value repeated for its pair, or as e^(i angle).

    Computed in `freqs_dtype`, returned in float32 (complex64). Raises ValueError for an odd `dim`.
    """
    if dim % 2:
        raise ValueError(f"get_1d_rotary_pos_embed: dim must be even, got {dim}")
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=freqs_dtype, device=pos.device) / dim)
    angles = torch.outer(pos, frequencies)
    if not use_real:
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
    return tuple(repeat(wave, "sequence pairs -> sequence (pairs 2)").float() for wave in (angles.cos(), angles.sin()))


class FluxPosEmbed(nn.Module):
    """Position ids to the cosines and sines of all axes, side by side. Has no parameters."""

    def __init__(self, theta: float, axes_dim: tuple[int, ...]):
        super().__init__()
        self.theta = theta
        self.axes_dim = axes_dim

    @shaped
    def forward(self, ids: Float[Tensor, "sequence axes"]) -> tuple[Float[Tensor, "sequence head_dim"], Float[Tensor, "sequence head_dim"]]:
        if ids.shape[1] != len(self.axes_dim):
            raise ValueError(
                f"FluxPosEmbed: ids have {ids.shape[1]} numbers a token, expected {len(self.axes_dim)}, one for each of axes_dim"
            )
        # Apple's GPU has no float64.
        freqs_dtype = torch.float32 if ids.device.type == "mps" else torch.float64
        waves = [
            get_1d_rotary_pos_embed(dim, pos, theta=self.theta, freqs_dtype=freqs_dtype)
            for dim, pos in zip(self.axes_dim, ids.float().unbind(dim=1), strict=True)
        ]
        cos, sin = zip(*waves, strict=True)
        return torch.cat(cos, dim=-1), torch.cat(sin, dim=-1)


@shaped
def apply_rotary_emb(
    x: Float[Tensor, "batch sequence heads head_dim"],
    image_rotary_emb: tuple[Float[Tensor, "sequence head_dim"], Float[Tensor, "sequence head_dim"]] | Complex[Tensor, "sequence pairs"],
) -> Float[Tensor, "batch sequence heads head_dim"]:
    """Turn the pairs (x0, x1), (x2, x3), ... by the angles; in float32, returned in the dtype of `x`.

    The real form, (cos, sin), is what FLUX.1 uses; the complex form is the same rotation as one multiplication.
    """
    if isinstance(image_rotary_emb, Tensor):
        pairs = torch.view_as_complex(rearrange(x.float(), "... (pairs two) -> ... pairs two", two=2).contiguous())
        turned = torch.view_as_real(pairs * image_rotary_emb[None, :, None, :])
        return rearrange(turned, "... pairs two -> ... (pairs two)").to(x.dtype)
    cos, sin = (wave[None, :, None, :] for wave in image_rotary_emb)
    real, imaginary = rearrange(x, "... (pairs two) -> two ... pairs", two=2)
    quarter_turn = rearrange([-imaginary, real], "two ... pairs -> ... (pairs two)")
    return (x.float() * cos + quarter_turn.float() * sin).to(x.dtype)
