"""Configurations of the SD 1.5 generation, and the presets. The only file of this package with SD 1.5's sizes in it.

Defaults are upstream's, so that a `config.json` that leaves a field out means the same here.
"""

import dataclasses
from typing import Any, ClassVar

from flux_lab.config import MINI_CLIP, MINI_VAE, AutoencoderKLConfig, Config

DOWN_BLOCK_TYPES = ("CrossAttnDownBlock2D", "DownBlock2D")
UP_BLOCK_TYPES = ("CrossAttnUpBlock2D", "UpBlock2D")


@dataclasses.dataclass(frozen=True)
class UNet2DConditionConfig(Config):
    """UNet2DConditionModel. `attention_head_dim` is the *number* of heads of every attention: upstream's name is a known mistake."""

    CLASS_NAME: ClassVar[str] = "UNet2DConditionModel"
    SUPPORTED: ClassVar[dict[str, tuple]] = {
        "act_fn": ("silu",),
        "addition_embed_type": (None,),
        "attention_type": ("default",),
        "center_input_sample": (False,),
        "class_embed_type": (None,),
        "class_embeddings_concat": (False,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "cross_attention_norm": (None,),
        "downsample_padding": (1,),
        "dropout": (0.0,),
        "dual_cross_attention": (False,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
        "mid_block_only_cross_attention": (None, False),
        "mid_block_scale_factor": (1,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "num_attention_heads": (None,),
        "num_class_embeds": (None,),
        "only_cross_attention": (False,),
        "resnet_out_scale_factor": (1.0,),
        "resnet_skip_time_act": (False,),
        "resnet_time_scale_shift": ("default",),
        "reverse_transformer_layers_per_block": (None,),
        "time_cond_proj_dim": (None,),
        "time_embedding_act_fn": (None,),
        "time_embedding_dim": (None,),
        "time_embedding_type": ("positional",),
        "timestep_post_act": (None,),
        "transformer_layers_per_block": (1,),
        "upcast_attention": (False,),
        "use_linear_projection": (False,),
    }

    sample_size: int | None = None
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    layers_per_block: int = 2
    cross_attention_dim: int = 1280
    attention_head_dim: int = 8
    norm_num_groups: int = 32
    norm_eps: float = 1e-5

    def __post_init__(self):
        for name in ("layers_per_block", "cross_attention_dim", "attention_head_dim", "norm_num_groups"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not supported, expected one positive integer for all levels")
        self._check_levels("down_block_types", DOWN_BLOCK_TYPES)
        self._check_levels("up_block_types", UP_BLOCK_TYPES)
        if self.block_out_channels[0] % 2:
            raise ValueError(
                f"block_out_channels={self.block_out_channels}: the first is half sines, half cosines, expected an even number"
            )
        # The heads divide every level, whether it attends or not: the middle block always does.
        for name in ("norm_num_groups", "attention_head_dim"):
            for channels in self.block_out_channels:
                if channels % getattr(self, name):
                    raise ValueError(
                        f"block_out_channels={self.block_out_channels}: {channels} is not a multiple of {name}={getattr(self, name)}"
                    )

    def _check_levels(self, name: str, allowed: tuple[str, ...]) -> None:
        types, levels = getattr(self, name), len(self.block_out_channels)
        if len(types) != levels:
            raise ValueError(f"{name} has {len(types)} blocks, expected {levels}, as many as block_out_channels={self.block_out_channels}")
        for given in types:
            if given not in allowed:
                raise ValueError(f"{name}: {given!r} is not supported, expected one of {list(allowed)}")

    @property
    def heads(self) -> int:
        """Heads of every attention; a head is `channels / heads` wide, so its width changes from level to level."""
        return self.attention_head_dim

    @property
    def time_embed_dim(self) -> int:
        """Width of the time vector."""
        return 4 * self.block_out_channels[0]


@dataclasses.dataclass(frozen=True)
class NoiseScheduleConfig(Config):
    """What the diffusion schedulers have in common: the noise schedule, what the network predicts, and which timesteps are visited."""

    SUPPORTED: ClassVar[dict[str, tuple]] = {"trained_betas": (None,)}
    PREDICTION_TYPES: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction")

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0

    def __post_init__(self):
        self._check_choice("beta_schedule", ("linear", "scaled_linear"))
        self._check_choice("prediction_type", self.PREDICTION_TYPES)
        self._check_choice("timestep_spacing", ("linspace", "leading", "trailing"))

    def _check_choice(self, name: str, allowed: tuple[Any, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name}={getattr(self, name)!r} is not supported, expected one of {list(allowed)}")


@dataclasses.dataclass(frozen=True)
class PNDMSchedulerConfig(NoiseScheduleConfig):
    """PNDMScheduler. `set_alpha_to_one`: the last step ends in a picture without noise, instead of at timestep 0's noise level."""

    CLASS_NAME: ClassVar[str] = "PNDMScheduler"

    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False


@dataclasses.dataclass(frozen=True)
class DDPMSchedulerConfig(NoiseScheduleConfig):
    """DDPMScheduler. `clip_sample` is for pictures in [-1, 1]; latents have no such bounds and need it off."""

    CLASS_NAME: ClassVar[str] = "DDPMScheduler"
    SUPPORTED: ClassVar[dict[str, tuple]] = {**NoiseScheduleConfig.SUPPORTED, "thresholding": (False,), "rescale_betas_zero_snr": (False,)}
    PREDICTION_TYPES: ClassVar[tuple[str, ...]] = ("epsilon", "sample", "v_prediction")

    variance_type: str = "fixed_small"
    clip_sample: bool = True
    clip_sample_range: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        self._check_choice("variance_type", ("fixed_small", "fixed_large"))


SD15_UNET = UNet2DConditionConfig(sample_size=64, cross_attention_dim=768)
SD15_VAE = AutoencoderKLConfig(
    latent_channels=4, sample_size=512, scaling_factor=0.18215, shift_factor=None, use_quant_conv=True, use_post_quant_conv=True
)
SD15_PNDM = PNDMSchedulerConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1)
SD15_DDPM = DDPMSchedulerConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)

# The trained example: SD 1.5's anatomy at 1/16 of its width, two heads in place of eight, 128-pixel pictures; its schedulers are SD 1.5's.
# The autoencoder is the miniature's with SD 1.5's latents; its scaling factor is measured after training.
MINI_UNET = dataclasses.replace(
    SD15_UNET,
    sample_size=16,
    block_out_channels=(20, 40, 80, 80),
    cross_attention_dim=MINI_CLIP.hidden_size,
    attention_head_dim=2,
    norm_num_groups=4,
)
MINI_SD_VAE = dataclasses.replace(
    MINI_VAE, latent_channels=4, scaling_factor=0.18215, shift_factor=None, use_quant_conv=True, use_post_quant_conv=True
)

# For tests: as small as the anatomy allows, every size distinct.
TINY_UNET = UNet2DConditionConfig(
    sample_size=16,
    block_out_channels=(8, 16, 24),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=10,
    attention_head_dim=2,
    norm_num_groups=4,
)
