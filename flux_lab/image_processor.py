"""Pictures to tensors in [-1, 1] before the VAE, tensors to pictures after it. Source: diffusers `image_processor.py`.

Between the two lies [0, 1], which is also the range of given arrays and tensors. PIL images are resized with the LANCZOS filter,
arrays and tensors by taking the nearest pixel.
"""

import dataclasses
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from flux_lab.config import Config
from flux_lab.shapes import ShapeError, shaped

Picture = Image.Image | np.ndarray | Tensor
MODES = ("RGB", "RGBA", "L")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclasses.dataclass(frozen=True)
class VaeImageProcessor(Config):
    """Sizes are floored to multiples of `vae_scale_factor`: for FLUX.1 twice the VAE's own factor, because of the 2x2 patches."""

    CLASS_NAME: ClassVar[str] = "VaeImageProcessor"
    SUPPORTED: ClassVar[dict[str, tuple]] = {
        "resample": ("lanczos",),
        "reducing_gap": (None,),
        "do_binarize": (False,),
        "do_convert_grayscale": (False,),
    }

    vae_scale_factor: int = 8
    vae_latent_channels: int = 4
    do_resize: bool = True
    do_normalize: bool = True
    do_convert_rgb: bool = False

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> Self:
        """Build from the fields of diffusers' configuration. Raises ValueError for a field that we cannot honour."""
        return cls.from_dict(values)

    @shaped
    def preprocess(
        self, image: Picture | list[Picture], height: int | None = None, width: int | None = None
    ) -> Float[Tensor, "batch channels height width"]:
        """Pictures to one tensor in [-1, 1], all of the size of the first, or of the size given; both are floored.

        Arrays are `[height, width]`, `[height, width, channels]` or `[batch, height, width, channels]`, tensors have the channels
        before the height; both hold floats in [0, 1]. If any number is negative, they are taken to be in [-1, 1] already.
        A tensor with `vae_latent_channels` channels is taken to be latents and returned as it is.
        Raises TypeError for anything else, ShapeError for a wrong number of axes, ValueError for a wrong mode, dtype or size.
        """
        images = image if isinstance(image, list) else [image]
        _check_images(images, self.do_convert_rgb)
        if isinstance(images[0], Image.Image):
            batch = self._stack_pil(images, height, width)
        else:
            batch = stack_arrays(images) if isinstance(images[0], np.ndarray) else stack_tensors(images)
            if isinstance(images[0], Tensor) and batch.shape[1] == self.vae_latent_channels:
                return batch
            if self.do_resize:
                batch = F.interpolate(batch, size=self._target_size(*batch.shape[2:], height, width))
        if self.do_normalize and batch.min() >= 0:
            batch = 2.0 * batch - 1.0
        return batch

    @shaped
    def postprocess(
        self, image: Float[Tensor, "batch channels height width"], output_type: str = "pil"
    ) -> list[Image.Image] | np.ndarray | Float[Tensor, "batch channels height width"]:
        """A tensor in [-1, 1] to pictures.

        "pil": a list; "np": an array `[batch, height, width, channels]` in [0, 1]; "pt": a tensor in [0, 1]; "latent": unchanged.
        """
        check_output_type(output_type)
        if output_type == "latent":
            return image
        if self.do_normalize:
            image = (image * 0.5 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return image
        array = rearrange(image.detach().cpu().float().numpy(), "batch channels height width -> batch height width channels")
        return array if output_type == "np" else array_to_pil(array)

    def _stack_pil(self, images: list[Image.Image], height: int | None, width: int | None) -> Tensor:
        if self.do_resize:
            height, width = self._target_size(images[0].height, images[0].width, height, width)
            images = [image.resize((width, height), resample=Image.Resampling.LANCZOS) for image in images]
        if self.do_convert_rgb:
            images = [image.convert("RGB") for image in images]
        return stack_arrays([np.array(image).astype(np.float32) / 255.0 for image in images])

    def _target_size(self, own_height: int, own_width: int, height: int | None, width: int | None) -> tuple[int, int]:
        """The size asked for, or the image's own, floored to multiples of `vae_scale_factor`."""
        height, width = (own_height if height is None else height), (own_width if width is None else width)
        factor = self.vae_scale_factor
        if min(height, width) < factor:
            raise ValueError(f"height={height}, width={width}: expected at least vae_scale_factor={factor} each")
        return height - height % factor, width - width % factor


def stack_arrays(images: list[np.ndarray]) -> Tensor:
    """Arrays with the channels last, or without channels, to one tensor with the channels second."""
    batch = np.concatenate(images) if images[0].ndim == 4 else np.stack(images)
    if batch.ndim == 3:
        batch = rearrange(batch, "batch height width -> batch height width 1")
    return torch.from_numpy(rearrange(batch, "batch height width channels -> batch channels height width"))


def stack_tensors(images: list[Tensor]) -> Tensor:
    """Tensors with the channels first, each one image or a batch, to one batch."""
    return torch.cat(images) if images[0].ndim == 4 else torch.stack(images)


def array_to_pil(array: np.ndarray) -> list[Image.Image]:
    """Numbers in [0, 1], channels last, to 8-bit pictures. Halves are rounded to the even number."""
    pixels = (array * 255).round().astype(np.uint8)
    return [Image.fromarray(one[:, :, 0] if one.shape[-1] == 1 else one) for one in pixels]


def _check_images(images: list[Picture], convert: bool) -> None:
    """Raise the error that names what is wrong with the first bad image."""
    where = "VaeImageProcessor.preprocess: argument `image`"
    kind = next((kind for kind in (Image.Image, np.ndarray, Tensor) if images and isinstance(images[0], kind)), None)
    if kind is None or not all(isinstance(image, kind) for image in images):
        names = [type(image).__name__ for image in images]
        raise TypeError(f"{where}: expected PIL images, arrays or tensors, one or a list of one kind, got {names}")
    for image in images:
        if kind is Image.Image:
            _check_mode(where, image.mode, images[0].mode, convert)
        else:
            _check_array(where, image, images[0].shape)


def _check_mode(where: str, mode: str, first: str, convert: bool) -> None:
    if not convert and (mode not in MODES or mode != first):
        raise ValueError(f"{where}: PIL mode {mode!r}, expected one of {list(MODES)}, the same for all: use image.convert('RGB')")


def _check_array(where: str, image: np.ndarray | Tensor, first: tuple[int, ...]) -> None:
    if isinstance(image, Tensor):
        expected, ndims, is_float = "[channels height width] or [batch channels height width]", (3, 4), image.is_floating_point()
    else:
        expected, ndims = "[height width], [height width channels] or [batch height width channels]", (2, 3, 4)
        is_float = np.issubdtype(image.dtype, np.floating)
    if image.ndim not in ndims or (image.shape[1:] if image.ndim == 4 else image.shape) != (first[1:] if len(first) == 4 else first):
        raise ShapeError(f"{where}: expected {expected}, the same for all, got {list(image.shape)} next to {list(first)}")
    if not is_float:
        raise ValueError(f"{where}: expected floats in [0, 1], got {image.dtype}: divide by 255, or give a PIL image")


def check_output_type(output_type: str) -> None:
    """Raises ValueError for none of `OUTPUT_TYPES`."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r}, expected one of {list(OUTPUT_TYPES)}")
