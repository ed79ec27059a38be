"""How well the autoencoder keeps the pictures of scenes, and whether its latents are what the transformer expects."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from tqdm import tqdm

from flux_lab import shapes
from flux_lab.autoencoder import AutoencoderKL
from flux_lab.training.raytrace import OVERSAMPLING, camera_rays
from flux_lab.training.solids import meet
from flux_lab.training.vae import to_tensor
from flux_lab.training.world import EYE, Scene

PEAK = 255.0


def object_masks(scenes: Sequence[Scene], size: int) -> Bool[np.ndarray, "scenes size size"]:
    """The pixels that an object covers, all of their rays."""
    rays = camera_rays(size).direction
    side = size * OVERSAMPLING
    eye = np.array(EYE, np.float32)[:, None]
    flat = rearrange(rays, "xyz rows columns -> xyz (rows columns)", rows=side, columns=side)
    masks = []
    for scene in scenes:
        met = np.any([np.isfinite(meet(item, eye, flat)) for item in scene.objects], axis=0)
        fine = rearrange(met, "(rows v columns h) -> rows columns (v h)", rows=size, columns=size, v=OVERSAMPLING, h=OVERSAMPLING)
        masks.append(fine.all(axis=-1))
    return np.stack(masks)


@torch.no_grad()
def reconstruct(
    vae: AutoencoderKL, images: UInt8[np.ndarray, "images height width 3"], batch_size: int = 25
) -> tuple[UInt8[np.ndarray, "images height width 3"], Float[Tensor, "images channels rows columns"]]:
    """Pictures through the autoencoder and back, without noise, and their latents as the transformer sees them: shifted and scaled."""
    first = next(vae.parameters())
    pictures, latents = [], []
    with shapes.checks(enabled=False):
        for start in tqdm(range(0, len(images), batch_size), desc="reconstructing", mininterval=2, delay=2):
            posterior = vae.encode(to_tensor(images[start : start + batch_size]).to(first.device, first.dtype))
            latents.append((posterior.mean.float().cpu() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor)
            decoded = vae.decode(posterior.mode()).float().cpu().clamp(-1, 1)
            bytes_ = ((decoded + 1) * (PEAK / 2)).round().to(torch.uint8)
            pictures.append(rearrange(bytes_, "batch color height width -> batch height width color").numpy())
    return np.concatenate(pictures), torch.cat(latents)


def psnr(
    images: UInt8[np.ndarray, "images height width 3"],
    others: UInt8[np.ndarray, "images height width 3"],
    masks: Bool[np.ndarray, "images height width"] | None = None,
) -> Float[np.ndarray, "images"]:
    """Peak signal-to-noise ratio of each picture in dB, of all its pixels or of those in its mask; at most that of one step of one byte."""
    square = reduce((images.astype(np.float64) - others) ** 2, "images height width color -> images height width", "mean")
    weights = np.ones_like(square) if masks is None else masks
    error = (square * weights).sum(axis=(1, 2)) / weights.sum(axis=(1, 2))
    return 10 * np.log10(PEAK**2 / np.maximum(error, 1 / square[0].size))


def ssim(
    images: UInt8[np.ndarray, "images height width 3"], others: UInt8[np.ndarray, "images height width 3"]
) -> Float[np.ndarray, "images"]:
    """Structural similarity of each picture, at most 1: the mean over places and colours (Wang et al. 2004, equation 13).

    A Gaussian window of 11 x 11 pixels, standard deviation 1.5; only windows that lie inside the picture count.
    """
    offsets = torch.arange(-5, 6, dtype=torch.float64)
    gaussian = torch.softmax(-(offsets**2) / (2 * 1.5**2), dim=0)
    window = torch.outer(gaussian, gaussian)[None, None]

    def local_mean(values: Tensor) -> Tensor:
        return F.conv2d(values, window)

    x, y = (
        rearrange(torch.from_numpy(each), "images height width color -> (images color) 1 height width").double()
        for each in (images, others)
    )
    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x, variance_y = local_mean(x**2) - mean_x**2, local_mean(y**2) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    index = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    return reduce(index, "(images color) 1 height width -> images", "mean", color=3).numpy()


def vae_quality(
    images: UInt8[np.ndarray, "images height width 3"],
    decoded: UInt8[np.ndarray, "images height width 3"],
    latents: Float[Tensor, "images channels rows columns"],
    scenes: Sequence[Scene],
) -> dict[str, float]:
    """Means over the pictures: PSNR in dB, whole and inside the objects, SSIM; mean and standard deviation of all scaled latents."""
    masks = object_masks(scenes, images.shape[1])
    return {
        "pictures": len(images),
        "psnr": float(psnr(images, decoded).mean()),
        "psnr_inside_objects": float(psnr(images, decoded, masks).mean()),
        "ssim": float(np.mean([ssim(image[None], other[None]) for image, other in zip(images, decoded, strict=True)])),
        "latent_mean": latents.mean().item(),
        "latent_std": latents.std().item(),
    }
