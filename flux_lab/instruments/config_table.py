"""A part's configuration beside that of FLUX.1-dev, every field explained."""

import dataclasses
import json
from pathlib import Path

from flux_lab.config import Config
from flux_lab.instruments.anatomy import FLUX_1_DEV, MINIATURE, Anatomy
from flux_lab.instruments.table import Table

PARTS = ("text_encoder", "text_encoder_2", "transformer", "scheduler", "vae")
MEANINGS = {
    "FluxTransformer2DModel": {
        "in_channels": "numbers in one image token: 16 channels x 2 x 2",
        "out_channels": "numbers out of one image token; None: as many as go in",
        "num_layers": "double-stream blocks: text and image keep separate weights",
        "num_single_layers": "single-stream blocks: text and image share weights",
        "attention_head_dim": "width of one attention head",
        "num_attention_heads": "attention heads; heads x head width is the width of the model",
        "joint_attention_dim": "width of T5's token vectors",
        "pooled_projection_dim": "width of CLIP's one vector",
        "guidance_embeds": "whether the guidance scale is an input of the network",
        "axes_dims_rope": "channels of a head that turn with (unused, row, column)",
    },
    "AutoencoderKL": {
        "in_channels": "colours in",
        "out_channels": "colours out",
        "block_out_channels": "width of each level; every level but the last halves the picture",
        "layers_per_block": "ResNet layers a level in the encoder; the decoder has one more",
        "latent_channels": "numbers kept for each 8 x 8 pixels",
        "norm_num_groups": "groups of the group normalisation",
        "sample_size": "pixels along one side of the pictures it was trained on",
        "scaling_factor": "makes the standard deviation of the latents 1",
        "shift_factor": "the mean of the latents, taken off before scaling",
        "use_quant_conv": "a 1 x 1 convolution behind the encoder (SD 1.5 has it, FLUX.1 does not)",
        "use_post_quant_conv": "the same in front of the decoder",
    },
    "CLIPTextModel": {
        "vocab_size": "ids of tokens, each with a vector",
        "hidden_size": "width",
        "intermediate_size": "width inside the MLP",
        "num_hidden_layers": "layers",
        "num_attention_heads": "attention heads",
        "max_position_embeddings": "tokens of a prompt, start and end included",
        "layer_norm_eps": "keeps layer normalisation from dividing by zero",
        "eos_token_id": "2 is a relic: the pooled token is the one with the highest id, which is the end token",
    },
    "T5EncoderModel": {
        "vocab_size": "ids of tokens, each with a vector",
        "d_model": "width",
        "d_kv": "width of one attention head",
        "d_ff": "width inside the MLP",
        "num_layers": "layers",
        "num_heads": "attention heads",
        "relative_attention_num_buckets": "distances between tokens that it tells apart",
        "relative_attention_max_distance": "sets how fast the buckets widen; the last takes all distances from 91 on",
        "layer_norm_epsilon": "keeps the normalisation from dividing by zero",
    },
    "FlowMatchEulerDiscreteScheduler": {
        "num_train_timesteps": "a timestep is sigma times this",
        "shift": "a fixed shift of the noise levels; unused with dynamic shifting",
        "use_dynamic_shifting": "whether the shift depends on the number of image tokens",
        "base_shift": "the shift mu at `base_image_seq_len` tokens",
        "max_shift": "the shift mu at `max_image_seq_len` tokens",
        "base_image_seq_len": "tokens of a picture of 256 x 256 pixels",
        "max_image_seq_len": "tokens of a picture of 1024 x 1024 pixels",
        "shift_terminal": "stretch the schedule so that it ends at this level; None: do not",
        "time_shift_type": "whether the curve uses e^mu or mu itself",
        "stochastic_sampling": "add fresh noise in every step",
    },
}


def config_table(part: str, anatomy: Anatomy = MINIATURE, reference: Anatomy = FLUX_1_DEV) -> Table:
    """Every field of a part's configuration, in both models, and what it means. Raises ValueError for an unknown part."""
    if part not in PARTS:
        raise ValueError(f"part: expected one of {list(PARTS)}, got {part!r}")
    ours: Config = getattr(anatomy, part)
    theirs: Config = getattr(reference, part)
    meanings = MEANINGS[ours.CLASS_NAME]
    names = [field.name for field in dataclasses.fields(ours)]
    rows = [[f"`{name}`", getattr(ours, name), getattr(theirs, name), meanings[name]] for name in names]
    return Table([part, anatomy.name, reference.name, "what it is"], rows)


def model_index(folder: str | Path) -> Table:
    """The parts that a checkpoint's `model_index.json` names: folder, the library that has its class upstream, and the class."""
    values = json.loads((Path(folder) / "model_index.json").read_text(encoding="utf-8"))
    return Table(["folder", "library", "class"], [[f"`{part}/`", *value] for part, value in values.items() if isinstance(value, list)])
