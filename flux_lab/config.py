"""Configurations: one frozen dataclass a model, read from and written to the upstream `config.json`, and the presets.

A variant is `dataclasses.replace(FLUX_DEV, guidance_embeds=False)`. This is the only file with FLUX.1's sizes in it.
"""

import dataclasses
from typing import Any, ClassVar, Self


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of all configurations.

    `SUPPORTED` lists upstream fields that we do not have as an option because FLUX.1 and SD 1.5 use one value of them; another
    value would change the result, so it is refused. All other unknown fields do not change the result and are ignored.
    """

    SUPPORTED: ClassVar[dict[str, tuple]] = {}
    CLASS_NAME: ClassVar[str] = ""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read an upstream `config.json`, already parsed.

        Raises ValueError for a value that we cannot honour, TypeError when `values` is not a mapping.
        """
        if not isinstance(values, dict):
            raise TypeError(f"{cls.__name__}: expected a dict of configuration fields, got {type(values).__name__}")
        for name, allowed in cls.SUPPORTED.items():
            given = values.get(name, allowed[0])
            for value in given if isinstance(given, list | tuple) else [given]:
                if value not in allowed:
                    raise ValueError(f"{cls.__name__}: {name}={value!r} is not supported, expected one of {list(allowed)}")
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        """The fields as upstream's json has them (tuples as lists), with the fixed ones upstream needs to rebuild the model."""
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()}
        return {"_class_name": self.CLASS_NAME, **fields}


@dataclasses.dataclass(frozen=True)
class FluxTransformer2DConfig(Config):
    """FluxTransformer2DModel. The width of the model is `num_attention_heads * attention_head_dim`."""

    CLASS_NAME: ClassVar[str] = "FluxTransformer2DModel"
    SUPPORTED: ClassVar[dict[str, tuple]] = {"patch_size": (1,)}

    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    def __post_init__(self):
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope={self.axes_dims_rope} sums to {sum(self.axes_dims_rope)}, "
                f"expected attention_head_dim={self.attention_head_dim}"
            )
        if any(dim % 2 for dim in self.axes_dims_rope):
            raise ValueError(f"axes_dims_rope={self.axes_dims_rope}: RoPE turns pairs of channels, expected even numbers")

    @property
    def inner_dim(self) -> int:
        """Width of the residual streams."""
        return self.num_attention_heads * self.attention_head_dim


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig(Config):
    """AutoencoderKL. FLUX.1: 16 latent channels, no quant convolutions; SD 1.5: 4 latent channels with them."""

    CLASS_NAME: ClassVar[str] = "AutoencoderKL"
    SUPPORTED: ClassVar[dict[str, tuple]] = {
        "act_fn": ("silu",),
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "mid_block_add_attention": (True,),
        "latents_mean": (None,),
        "latents_std": (None,),
    }
    # The defaults below are FLUX.1's; a `config.json` that leaves these out is older than the fields and has SD 1.5's.
    LEFT_OUT: ClassVar[dict[str, Any]] = {
        "latent_channels": 4,
        "scaling_factor": 0.18215,
        "shift_factor": None,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    }

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    norm_num_groups: int = 32
    sample_size: int = 1024
    scaling_factor: float = 0.3611
    shift_factor: float | None = 0.1159
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False

    def __post_init__(self):
        for name in ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups", "sample_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not supported, expected one positive integer")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels={self.block_out_channels}: {channels} is not a multiple of norm_num_groups={self.norm_num_groups}"
                )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return super().from_dict(cls.LEFT_OUT | values if isinstance(values, dict) else values)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of the image per latent, along one side: 8 for four levels."""
        return 2 ** (len(self.block_out_channels) - 1)

    def to_dict(self) -> dict[str, Any]:
        levels = len(self.block_out_channels)
        return super().to_dict() | {
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "act_fn": "silu",
        }


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(Config):
    """CLIPTextModel. `eos_token_id=2` is the historical value that makes the pooled token the one with the highest id."""

    CLASS_NAME: ClassVar[str] = "CLIPTextModel"
    SUPPORTED: ClassVar[dict[str, tuple]] = {"hidden_act": ("quick_gelu",)}

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 2

    def __post_init__(self):
        if not self.num_attention_heads or self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}")

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        del fields["_class_name"]
        # The start token is the last but one of the vocabulary; without it upstream takes CLIP's own id, and warns if that is too large.
        fixed = {"model_type": "clip_text_model", "hidden_act": "quick_gelu", "bos_token_id": self.vocab_size - 2}
        return {"architectures": [self.CLASS_NAME], **fixed, **fields}


@dataclasses.dataclass(frozen=True)
class T5Config(Config):
    """T5EncoderModel, version 1.1 (gated GELU)."""

    CLASS_NAME: ClassVar[str] = "T5EncoderModel"
    SUPPORTED: ClassVar[dict[str, tuple]] = {"feed_forward_proj": ("gated-gelu",)}

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        del fields["_class_name"]
        fixed = {
            "model_type": "t5",
            "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": False,
            "use_cache": False,
            "tie_word_embeddings": False,
        }
        return {"architectures": [self.CLASS_NAME], **fixed, **fields}


@dataclasses.dataclass(frozen=True)
class FlowMatchEulerDiscreteSchedulerConfig(Config):
    """FlowMatchEulerDiscreteScheduler. With `use_dynamic_shifting` the shift follows from the number of image tokens, `shift` is unused."""

    CLASS_NAME: ClassVar[str] = "FlowMatchEulerDiscreteScheduler"
    SUPPORTED: ClassVar[dict[str, tuple]] = {
        "invert_sigmas": (False, None),
        "use_karras_sigmas": (False, None),
        "use_exponential_sigmas": (False, None),
        "use_beta_sigmas": (False, None),
    }

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift_terminal: float | None = None
    time_shift_type: str = "exponential"
    stochastic_sampling: bool = False

    def __post_init__(self):
        if self.time_shift_type not in ("exponential", "linear"):
            raise ValueError(f"time_shift_type={self.time_shift_type!r}, expected 'exponential' or 'linear'")


FLUX_DEV = FluxTransformer2DConfig(guidance_embeds=True)
FLUX_SCHNELL = dataclasses.replace(FLUX_DEV, guidance_embeds=False)
FLUX_VAE = AutoencoderKLConfig()
FLUX_CLIP = CLIPTextConfig()
FLUX_T5 = T5Config()
FLUX_DEV_SCHEDULER = FlowMatchEulerDiscreteSchedulerConfig(shift=3.0, use_dynamic_shifting=True)
FLUX_SCHNELL_SCHEDULER = FlowMatchEulerDiscreteSchedulerConfig(shift=1.0, use_dynamic_shifting=False)

# The bundled miniature: FLUX.1-dev's anatomy at 1/32 of its width. The scaling and shift of its VAE are measured after training.
FLUX_MINI = dataclasses.replace(
    FLUX_DEV, attention_head_dim=32, num_attention_heads=3, joint_attention_dim=128, pooled_projection_dim=64, axes_dims_rope=(4, 14, 14)
)
MINI_VAE = dataclasses.replace(FLUX_VAE, block_out_channels=(16, 32, 64, 64), norm_num_groups=8, sample_size=128)
MINI_CLIP = CLIPTextConfig(vocab_size=1000, hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4)
MINI_T5 = T5Config(vocab_size=512, d_model=128, d_kv=32, d_ff=256, num_layers=4, num_heads=4)

# For tests: as small as the anatomy allows, every size distinct.
TINY = dataclasses.replace(
    FLUX_DEV,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=20,
    axes_dims_rope=(4, 6, 6),
)
TINY_VAE = dataclasses.replace(FLUX_VAE, block_out_channels=(8, 16, 24, 32), layers_per_block=1, norm_num_groups=4, sample_size=64)
TINY_CLIP = CLIPTextConfig(
    vocab_size=600, hidden_size=20, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=16
)
TINY_T5 = T5Config(vocab_size=500, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=3, relative_attention_max_distance=32)
