"""Stage 7: the trained parts become one checkpoint in the diffusers layout.

    python -m flux_lab.training.export --transformer runs/deepened/transformer --vae runs/vae/vae --clip runs/clip/text_encoder
        --t5 runs/t5/text_encoder_2 --tokenizers runs/tokenizers --out data/flux-mini

Numbers are halved in size: bfloat16, which keeps float32's range, for the transformer with its long sums of residuals; float16 for the
autoencoder, whose numbers are small and whose pictures show bfloat16's coarser rounding. The text encoders, small as they are, stay in
float32: transformers loads a model in the dtype of its file, diffusers in float32, and a pipeline needs one for both. Afterwards the
folder is loaded and drawn from; SHA256SUMS says what its weights should be.
"""

import argparse
import filecmp
import hashlib
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flux_lab import shapes
from flux_lab.checkpoints import load_autoencoder, load_clip, load_t5, load_transformer, write_pipeline
from flux_lab.config import FLUX_DEV_SCHEDULER, FLUX_SCHNELL_SCHEDULER
from flux_lab.files import write_text
from flux_lab.latents import PATCH
from flux_lab.pipeline import FluxPipeline
from flux_lab.scheduler import FlowMatchEulerDiscreteScheduler

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROOF = "a red cube on grass"


def export(
    *,
    transformer: Path,
    vae: Path,
    clip: Path,
    t5: Path,
    tokenizers: Path,
    out: Path,
    dtype: torch.dtype = torch.bfloat16,
    vae_dtype: torch.dtype = torch.float16,
    share: Path | None = None,
) -> FluxPipeline:
    """Write the checkpoint `out` from the folders of its parts, and return the pipeline that was loaded from it.

    Parts that the checkpoint `share` holds as well become links to that one's. Raises CheckpointError for a part that cannot be read,
    ValueError for parts that do not fit together or lose their numbers.
    """
    models = {
        "transformer": load_transformer(transformer, dtype),
        "vae": load_autoencoder(vae, vae_dtype),
        "text_encoder": load_clip(clip, torch.float32),
        "text_encoder_2": load_t5(t5, torch.float32),
    }
    check_fit(models)
    check_finite(models)
    copied = {name: Path(tokenizers) / name for name in ("tokenizer", "tokenizer_2")}
    # As upstream: dev, which has a guidance embedding, shifts its noise levels with the picture's size; schnell does not.
    unlink_parts(out)
    schedule = FLUX_DEV_SCHEDULER if models["transformer"].config.guidance_embeds else FLUX_SCHNELL_SCHEDULER
    write_pipeline(out, models=models, scheduler=FlowMatchEulerDiscreteScheduler(schedule), tokenizers=copied)
    pipe = FluxPipeline.from_pretrained(out)
    check_picture(pipe)
    write_checksums(out)
    if share:
        share_parts(out, share)
    return pipe


def unlink_parts(folder: Path) -> None:
    """Remove links among a checkpoint's files: what is written next must not go where they lead."""
    for file in Path(folder).glob("*/*"):
        if file.is_symlink():
            file.unlink()


def share_parts(folder: Path, other: Path) -> None:
    """Replace every file of a part of `folder` by a relative link, where the same part of `other` has the same files."""
    for part in sorted(path for path in Path(folder).iterdir() if path.is_dir()):
        twin, names = Path(other) / part.name, sorted(file.name for file in part.iterdir())
        same_names = twin.is_dir() and names == sorted(file.name for file in twin.iterdir())
        if same_names and filecmp.cmpfiles(part, twin, names, shallow=False)[0] == names:
            for name in names:
                (part / name).unlink()
                (part / name).symlink_to(os.path.relpath(twin / name, part))


def write_checksums(folder: Path) -> None:
    """Write SHA256SUMS of the folder's weights, in the form that `sha256sum --check` reads."""
    files = sorted(Path(folder).glob("*/*.safetensors"))
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(folder).as_posix()}\n" for file in files]
    write_text(Path(folder) / "SHA256SUMS", "".join(lines))


def check_fit(models: dict[str, Any]) -> None:
    """Raises ValueError where the transformer does not take what another part gives."""
    transformer, vae, clip, t5 = (models[name].config for name in ("transformer", "vae", "text_encoder", "text_encoder_2"))
    pairs = (
        ("joint_attention_dim", transformer.joint_attention_dim, "T5's d_model", t5.d_model),
        ("pooled_projection_dim", transformer.pooled_projection_dim, "CLIP's hidden_size", clip.hidden_size),
        ("in_channels", transformer.in_channels, f"the VAE's latent_channels * {PATCH**2}", vae.latent_channels * PATCH**2),
    )
    for name, expected, other, given in pairs:
        if expected != given:
            raise ValueError(f"the transformer has {name}={expected}, but {other} is {given}: not trained together")


def check_finite(models: dict[str, Any]) -> None:
    """Raises ValueError for a number that is not finite: broken in training, or too large for the dtype."""
    for part, model in models.items():
        for name, tensor in model.state_dict().items():
            if not tensor.isfinite().all():
                raise ValueError(f"{part}: {name} has numbers that are not finite in {tensor.dtype}")


def check_picture(pipe: FluxPipeline) -> None:
    """Draw a picture in two steps. Raises ValueError when it is empty or not finite."""
    pipe.set_progress_bar_config(disable=True)
    with shapes.checks(enabled=False):
        (picture,) = pipe(PROOF, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    pipe.set_progress_bar_config()
    spread = float(np.std(picture))
    if not math.isfinite(spread) or spread == 0:
        raise ValueError(f"the exported pipeline draws nothing: expected a picture, got a standard deviation of {spread}")


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each of a checkpoint's folders."""
    return {part.name: sum(file.stat().st_size for file in part.iterdir()) for part in sorted(Path(folder).iterdir()) if part.is_dir()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m flux_lab.training.export", description="Write the miniature in the diffusers layout.")
    parser.add_argument("--transformer", type=Path, default=Path("runs/deepened/transformer"))
    parser.add_argument("--vae", type=Path, default=Path("runs/vae/vae"))
    parser.add_argument("--clip", type=Path, default=Path("runs/clip/text_encoder"))
    parser.add_argument("--t5", type=Path, default=Path("runs/t5/text_encoder_2"))
    parser.add_argument("--tokenizers", type=Path, default=Path("runs/tokenizers"), help="the folder of tokenizer/ and tokenizer_2/")
    parser.add_argument("--out", type=Path, default=Path("data/flux-mini"), help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the transformer")
    parser.add_argument("--vae-dtype", choices=DTYPES, default="float16")
    parser.add_argument("--share", type=Path, help="a checkpoint folder to whose parts links are made where they are the same")
    options = vars(parser.parse_args(arguments))
    options |= {name: DTYPES[options[name]] for name in ("dtype", "vae_dtype")}
    try:
        pipe = export(**options)
    except ValueError as error:
        parser.error(str(error))
    for name, size in sizes(options["out"]).items():
        print(f"{name:<16} {size / 1e6:6.2f} MB")
    config = pipe.transformer.config
    print(f"{options['out']}: {config.num_layers} + {config.num_single_layers} blocks, loaded and drawn from")


if __name__ == "__main__":
    main()
