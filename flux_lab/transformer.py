"""FLUX's transformer: noisy latent tokens and text in, the velocity of every latent token out."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flux_lab.blocks import FluxSingleTransformerBlock, FluxTransformerBlock
from flux_lab.config import FluxTransformer2DConfig
from flux_lab.embeddings import CombinedTimestepGuidanceTextProjEmbeddings, CombinedTimestepTextProjEmbeddings
from flux_lab.normalization import AdaLayerNormContinuous
from flux_lab.rope import FluxPosEmbed
from flux_lab.shapes import shaped

ROPE_THETA = 10000.0
TIME_SCALE = 1000


class FluxTransformer2DModel(nn.Module):
    """19 double-stream and 38 single-stream blocks between two linear layers. Parameter names are diffusers'."""

    def __init__(self, config: FluxTransformer2DConfig):
        super().__init__()
        self.config = config
        dim = config.inner_dim
        block = {"dim": dim, "num_attention_heads": config.num_attention_heads, "attention_head_dim": config.attention_head_dim}
        conditioning = CombinedTimestepGuidanceTextProjEmbeddings if config.guidance_embeds else CombinedTimestepTextProjEmbeddings
        self.pos_embed = FluxPosEmbed(theta=ROPE_THETA, axes_dim=config.axes_dims_rope)
        self.time_text_embed = conditioning(dim, config.pooled_projection_dim)
        self.context_embedder = nn.Linear(config.joint_attention_dim, dim)
        self.x_embedder = nn.Linear(config.in_channels, dim)
        self.transformer_blocks = nn.ModuleList(FluxTransformerBlock(**block) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(FluxSingleTransformerBlock(**block) for _ in range(config.num_single_layers))
        self.norm_out = AdaLayerNormContinuous(dim)
        self.proj_out = nn.Linear(dim, config.out_channels or config.in_channels)

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> "FluxTransformer2DModel":
        """From an upstream `config.json`, already parsed."""
        return cls(FluxTransformer2DConfig.from_dict(values))

    @shaped
    def forward(
        self,
        hidden_states: Float[Tensor, "batch tokens patch_channels"],
        encoder_hidden_states: Float[Tensor, "batch length joint_dim"],
        pooled_projections: Float[Tensor, "batch pooled_dim"],
        timestep: Float[Tensor, "batch"],
        img_ids: Float[Tensor, "tokens axes"],
        txt_ids: Float[Tensor, "length axes"],
        guidance: Float[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch tokens patch_channels_out"]:
        """The velocity, noise minus picture.

        `timestep` is sigma, in 0 ... 1, and `guidance` the guidance scale; both are cast to the model's dtype *before* they are
        multiplied by 1000, which in bf16 rounds them visibly: so it is upstream. Raises ValueError when `guidance` is missing
        for a model with a guidance embedding, or given to one without.
        """
        self._check_guidance(guidance)
        hidden_states = self.x_embedder(hidden_states)
        numbers = [value.to(hidden_states.dtype) * TIME_SCALE for value in (timestep, guidance) if value is not None]
        temb = self.time_text_embed(*numbers, pooled_projections)
        encoder_hidden_states = self.context_embedder(encoder_hidden_states)
        image_rotary_emb = self.pos_embed(torch.cat([txt_ids, img_ids]))

        for block in [*self.transformer_blocks, *self.single_transformer_blocks]:
            encoder_hidden_states, hidden_states = block(
                hidden_states=hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                temb=temb,
                image_rotary_emb=image_rotary_emb,
            )
        return self.proj_out(self.norm_out(hidden_states, temb))

    def _check_guidance(self, guidance: Tensor | None) -> None:
        if self.config.guidance_embeds and guidance is None:
            raise ValueError(
                "guidance: this model has a guidance embedding (guidance_embeds=True), expected a guidance scale for each of the batch"
            )
        if not self.config.guidance_embeds and guidance is not None:
            raise ValueError("guidance: this model has no guidance embedding (guidance_embeds=False), expected None")


def named_blocks(transformer: FluxTransformer2DModel) -> dict[str, nn.Module]:
    """Block by its name, `double 00` ... `single 37`, in the order in which they run."""
    kinds = {"double": transformer.transformer_blocks, "single": transformer.single_transformer_blocks}
    return {f"{kind} {index:02d}": block for kind, blocks in kinds.items() for index, block in enumerate(blocks)}
