"""The last stage of the SD 1.5 example: its trained parts become one checkpoint in the diffusers layout.

    python -m flux_lab.training.export_sd15 --unet runs/unet/unet --vae runs/sd15_vae/vae --clip runs/clip/text_encoder
        --tokenizer runs/tokenizers/tokenizer --out data/sd15-mini

The UNet and the autoencoder are written in float16, the text encoder in float32, as `training.export` does and for its reasons.
Afterwards the folder is loaded and drawn from; SHA256SUMS says what its weights should be, README.md what they can do: reconstruction and
noise errors on `--scenes` held-out scenes, and how often `--prompts` prompts are obeyed, where the attribute reader is there.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from flux_lab import data_dir, shapes
from flux_lab.checkpoints import load_autoencoder, load_clip
from flux_lab.sd15.checkpoints import load_unet, write_sd15
from flux_lab.sd15.config import SD15_PNDM
from flux_lab.sd15.pipeline import StableDiffusionPipeline, load_sd15
from flux_lab.sd15.pndm import PNDMScheduler
from flux_lab.training import card_sd15
from flux_lab.training.export import DTYPES, PROOF, check_finite, sizes, write_checksums
from flux_lab.training.reader_model import WEIGHTS_FILE, load_reader


def export(*, unet: Path, vae: Path, clip: Path, tokenizer: Path, out: Path, dtype: torch.dtype = torch.float16) -> StableDiffusionPipeline:
    """Write the checkpoint `out` from the folders of its parts, and return the pipeline that was loaded from it.

    Raises CheckpointError for a part that cannot be read, ValueError for parts that do not fit together or lose their numbers.
    """
    models = {
        "unet": load_unet(unet, dtype),
        "vae": load_autoencoder(vae, dtype),
        "text_encoder": load_clip(clip, torch.float32),
    }
    check_fit(models)
    check_finite(models)
    write_sd15(out, models=models, scheduler=PNDMScheduler(SD15_PNDM), tokenizer=tokenizer)
    pipe = load_sd15(out)
    check_picture(pipe)
    write_checksums(out)
    return pipe


def check_fit(models: dict[str, Any]) -> None:
    """Raises ValueError where the UNet does not take what another part gives."""
    unet, vae, clip = (models[name].config for name in ("unet", "vae", "text_encoder"))
    pairs = (
        ("cross_attention_dim", unet.cross_attention_dim, "CLIP's hidden_size", clip.hidden_size),
        ("in_channels", unet.in_channels, "the VAE's latent_channels", vae.latent_channels),
        ("sample_size", unet.sample_size, f"the VAE's sample_size / {vae.vae_scale_factor}", vae.sample_size // vae.vae_scale_factor),
    )
    for name, expected, other, given in pairs:
        if expected != given:
            raise ValueError(f"the UNet has {name}={expected}, but {other} is {given}: not trained together")


def check_picture(pipe: StableDiffusionPipeline) -> None:
    """Draw a picture in two steps. Raises ValueError when it is empty or not finite."""
    with shapes.checks(enabled=False):
        picture = pipe(PROOF, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    spread = picture.std()
    if not spread.isfinite() or spread == 0:
        raise ValueError(f"the exported pipeline draws nothing: expected a picture, got a standard deviation of {spread.item()}")


def write_card(pipe: StableDiffusionPipeline, options: argparse.Namespace) -> None:
    """Measure what was exported and write its README.md."""
    flux = load_autoencoder(options.flux, torch.float32) if (options.flux / "vae").exists() else None
    reader = load_reader(options.reader) if options.prompts and (options.reader / WEIGHTS_FILE).exists() else None
    report = card_sd15.measure(pipe, flux, reader, scenes=options.scenes, prompts=options.prompts, steps=options.steps)
    folders = {"clip": options.clip.parent, "vae": options.vae.parent, "unet": options.unet.parent}
    command = f"python -m flux_lab.training.export_sd15 --unet {options.unet} --vae {options.vae} --out {options.out}"
    card_sd15.write_card(options.out / "README.md", options.out, report, folders, command, options.trained_on)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m flux_lab.training.export_sd15", description="Write the SD 1.5 example for diffusers.")
    parser.add_argument("--unet", type=Path, default=Path("runs/unet/unet"))
    parser.add_argument("--vae", type=Path, default=Path("runs/sd15_vae/vae"))
    parser.add_argument("--clip", type=Path, default=Path("runs/clip/text_encoder"))
    parser.add_argument("--tokenizer", type=Path, default=Path("runs/tokenizers/tokenizer"))
    parser.add_argument("--out", type=Path, default=Path("data/sd15-mini"), help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the UNet and the autoencoder")
    parser.add_argument("--flux", type=Path, default=data_dir() / "flux-mini", help="whose autoencoder is measured beside this one's")
    parser.add_argument("--reader", type=Path, default=Path("runs/reader"), help="folder of the attribute reader, if there is one")
    parser.add_argument("--scenes", type=int, default=100, help="held-out scenes for the card's errors")
    parser.add_argument("--prompts", type=int, default=100, help="prompts for the card's obedience; 0: not measured")
    parser.add_argument("--steps", type=int, default=25, help="steps for each prompt")
    parser.add_argument("--trained-on", help="the machine, in words; default: this one")
    options = parser.parse_args(arguments)
    try:
        parts = {name: getattr(options, name) for name in ("unet", "vae", "clip", "tokenizer", "out")}
        pipe = export(**parts, dtype=DTYPES[options.dtype])
    except ValueError as error:
        parser.error(str(error))
    write_card(pipe, options)
    for name, size in sizes(options.out).items():
        print(f"{name:<16} {size / 1e6:6.2f} MB")
    print(f"{options.out}: loaded and drawn from")


if __name__ == "__main__":
    main()
