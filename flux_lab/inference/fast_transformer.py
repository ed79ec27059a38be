"""The transformer, made to be fast: the reference's weights, fewer and larger operations, the same velocity within rounding.

- Text and image stay in one tensor from the first block to the last; a block works on it in place.
- One matrix product makes queries, keys and values; in a single-stream block also the input of the MLP.
- `prepare` does before the loop what does not depend on the picture: the modulation of all steps, the text, the rotation.
- There are no shape checks, and `unflatten` takes the place of einops: at the miniature's width both cost more than the work itself.

First-block caching (off by default) changes the result: where the first block says nearly what it said at the step before, the change
that all other blocks made then is used again. Source: TeaCache (Liu et al. 2024, arXiv 2411.19108), ParaAttention's first block cache.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_lab.attention import FluxAttention
from flux_lab.blocks import FLOAT16_MAX, FluxSingleTransformerBlock, FluxTransformerBlock
from flux_lab.embeddings import get_timestep_embedding
from flux_lab.normalization import EPS
from flux_lab.transformer import TIME_SCALE, FluxTransformer2DModel


def fuse(*linears: nn.Linear) -> nn.Linear:
    """One linear layer with the outputs of all side by side. Raises ValueError for a layer that is not a plain `nn.Linear`."""
    check_plain(linears)
    outputs = sum(linear.out_features for linear in linears)
    fused = nn.Linear(linears[0].in_features, outputs, bias=linears[0].bias is not None, device="meta")
    fused.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
    if fused.bias is not None:
        fused.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
    return fused


def check_plain(layers: Iterable[nn.Module]) -> None:
    for layer in layers:
        if type(layer) is not nn.Linear:
            found = type(layer).__name__
            raise ValueError(f"pipe: expected plain linear layers, got {found}: make it fast before it is quantized or hoisted")


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm of x [batch, sequence, dim], times `scale` (to which 1 is added already) plus `shift`, both [batch, 1, dim]."""
    if len(x) == 1:  # weight and bias of a layer norm are the same for the whole batch
        return F.layer_norm(x, x.shape[-1:], weight=scale[0, 0], bias=shift[0, 0], eps=EPS)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), scale)


def rms_weights(norm_q: nn.RMSNorm, norm_k: nn.RMSNorm) -> nn.Parameter:
    """The weights of both norms, [2, 1, head_dim]: queries and keys are normalised together."""
    return nn.Parameter(torch.stack([norm_q.weight, norm_k.weight])[:, None], requires_grad=False)


def rms_norm_(qk: Tensor, weights: Tensor) -> None:
    """Divide every query and key by its root mean square and multiply by the weights, in place: [batch, sequence, 2, heads, head_dim]."""
    mean_square = torch.linalg.vector_norm(qk, dim=-1, keepdim=True, dtype=torch.float32).square_().div_(qk.shape[-1])
    qk.mul_(mean_square.add_(EPS).rsqrt_()).mul_(weights)


def rotate(qk: Tensor, rotation: Tensor) -> Tensor:
    """Turn pairs of channels: qk [batch, sequence, 2, heads, head_dim] by `rotation` [sequence, 1, 1, head_dim / 2, 2], its cos and sin."""
    pairs = qk.float().unflatten(-1, (qk.shape[-1] // 2, 2))
    if torch.compiler.is_compiling():  # it knows no complex numbers
        (real, imaginary), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
        turned = torch.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation))
    return turned.flatten(-2).to(qk.dtype)


def attend(qkv: Tensor, rotation: Tensor) -> Tensor:
    """Rotation and attention product: qkv [batch, sequence, 3, heads, head_dim] to [batch, sequence, heads * head_dim]."""
    query, key = rotate(qkv[:, :, :2], rotation).unbind(2)
    heads_first = (each.transpose(1, 2) for each in (query, key, qkv[:, :, 2]))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2).flatten(2)


def clip_float16_(x: Tensor) -> None:
    if x.dtype == torch.float16:
        x.clamp_(-FLOAT16_MAX, FLOAT16_MAX)


class FastStream(nn.Module):
    """What a double-stream block has for one of its streams."""

    def __init__(self, attn: FluxAttention, names: Sequence[str], norms: Sequence[str], out: nn.Linear, ff: nn.Module):
        super().__init__()
        self.heads = attn.heads
        self.qkv = fuse(*(getattr(attn, name) for name in names))
        self.norm = rms_weights(*(getattr(attn, name) for name in norms))
        self.out, self.up, self.down = out, ff.net[0].proj, ff.net[2]

    def project(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        qkv = self.qkv(modulated_norm(x, shift, scale)).unflatten(-1, (3, self.heads, self.norm.shape[-1]))
        rms_norm_(qkv[:, :, :2], self.norm)
        return qkv

    def add_(self, x: Tensor, attended: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, mlp_gate: Tensor) -> None:
        x.addcmul_(gate, self.out(attended))
        x.addcmul_(mlp_gate, self.down(F.gelu(self.up(modulated_norm(x, shift, scale)), approximate="tanh")))


class FastTransformerBlock(nn.Module):
    """Double-stream block."""

    def __init__(self, block: FluxTransformerBlock):
        super().__init__()
        attn = block.attn
        added = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
        self.text = FastStream(attn, *added, out=attn.to_add_out, ff=block.ff_context)
        self.image = FastStream(attn, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), out=attn.to_out[0], ff=block.ff)

    def forward(self, x: Tensor, length: int, modulation: Tensor, rotation: Tensor) -> None:
        """Change x [batch, sequence, dim], text first, in place. `modulation` [batch, 12, 1, dim]: six of the text, six of the image."""
        text, image = x[:, :length], x[:, length:]
        signals = modulation.unbind(1)
        qkv = torch.cat([self.text.project(text, *signals[0:2]), self.image.project(image, *signals[6:8])], dim=1)
        attended = attend(qkv, rotation)
        self.text.add_(text, attended[:, :length], *signals[2:6])
        self.image.add_(image, attended[:, length:], *signals[8:12])
        clip_float16_(text)


class FastSingleTransformerBlock(nn.Module):
    """Single-stream block."""

    def __init__(self, block: FluxSingleTransformerBlock):
        super().__init__()
        attn = block.attn
        self.heads, self.dim = attn.heads, attn.to_q.out_features
        self.qkv_mlp = fuse(attn.to_q, attn.to_k, attn.to_v, block.proj_mlp)
        self.norm = rms_weights(attn.norm_q, attn.norm_k)
        self.proj_out = block.proj_out

    def forward(self, x: Tensor, length: int, modulation: Tensor, rotation: Tensor) -> None:
        """Change x [batch, sequence, dim] in place. `modulation` [batch, 3, 1, dim]; `length` is not used."""
        shift, scale, gate = modulation.unbind(1)
        dim = self.dim
        hidden = self.qkv_mlp(modulated_norm(x, shift, scale))
        qkv = hidden[..., : 3 * dim].unflatten(-1, (3, self.heads, self.norm.shape[-1]))
        rms_norm_(qkv[:, :, :2], self.norm)
        # Attention goes where the values were, which lie beside the MLP: so both are side by side without a copy.
        hidden[..., 2 * dim : 3 * dim] = attend(qkv, rotation)
        torch.ops.aten.gelu_(hidden[..., 3 * dim :], approximate="tanh")
        both = hidden.flatten(0, 1)[:, 2 * dim :]
        x.addcmul_(gate, torch.addmm(self.proj_out.bias, both, self.proj_out.weight.T).view_as(x))
        clip_float16_(x)


@dataclass
class StepChange:
    """How much the first block said otherwise than before, relative, and whether the other blocks were left out for it."""

    change: float
    reused: bool


@dataclass
class Prepared:
    """What the passes of one generation have in common.

    `context` [batch, length, dim]; `modulations`, for each block and the last layer [steps, batch, signals, 1, dim]; `rotation`
    [sequence, 1, 1, head_dim / 2, 2]. The rest is for caching: what the first block and all others added at the last full step.
    """

    context: Tensor
    modulations: list[Tensor]
    rotation: Tensor
    first: Tensor | None = None
    others: Tensor | None = None
    log: list[StepChange] = field(default_factory=list)


class FastFluxTransformer2DModel(nn.Module):
    """Made from a reference transformer, whose weights it shares where they need not be fused.

    `prepare` once, then `step` for each step; `forward` is both, with the arguments of the reference. `cache_threshold` above 0 turns
    first-block caching on, for example 0.1: a change of less than a tenth.
    """

    def __init__(self, model: FluxTransformer2DModel, compile: bool = False, cache_threshold: float = 0.0):
        super().__init__()
        self.config, self.cache_threshold = model.config, cache_threshold
        self.time_text_embed, self.pos_embed = model.time_text_embed, model.pos_embed
        self.x_embedder, self.context_embedder, self.proj_out = model.x_embedder, model.context_embedder, model.proj_out
        doubles, singles = model.transformer_blocks, model.single_transformer_blocks
        self.blocks = nn.ModuleList([*map(FastTransformerBlock, doubles), *map(FastSingleTransformerBlock, singles)])
        text_and_image = [nn.ModuleList([block.norm1_context.linear, block.norm1.linear]) for block in doubles]
        one = [nn.ModuleList([block.norm.linear]) for block in singles]
        self.modulations = nn.ModuleList([*text_and_image, *one, nn.ModuleList([model.norm_out.linear])])
        check_plain(linear for linears in self.modulations for linear in linears)
        if compile:
            for block in self.blocks:
                block.compile()

    @torch.no_grad()
    def prepare(
        self,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timesteps: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None,
    ) -> Prepared:
        """All that does not depend on the picture. `timesteps` [steps, batch] or [steps, 1] in 0 ... 1; the rest as for the reference."""
        embed, dtype = self.time_text_embed, encoder_hidden_states.dtype
        times = get_timestep_embedding(timesteps.to(dtype).flatten() * TIME_SCALE).to(dtype)
        conditioning = embed.timestep_embedder(times).unflatten(0, timesteps.shape)
        if guidance is not None:
            conditioning = conditioning + embed.guidance_embedder(get_timestep_embedding(guidance.to(dtype) * TIME_SCALE).to(dtype))
        signal = F.silu(conditioning + embed.text_embedder(pooled_projections))
        cos, sin = (wave[:, None, None, ::2] for wave in self.pos_embed(torch.cat([txt_ids, img_ids])))
        modulations = [self._modulation(linears, signal) for linears in self.modulations]
        return Prepared(self.context_embedder(encoder_hidden_states), modulations, torch.stack([cos, sin], dim=-1))

    def _modulation(self, linears: Sequence[nn.Linear], signal: Tensor) -> Tensor:
        """What the adaptive norms of one block say at all steps, with 1 added to every scale: [steps, batch, signals, 1, dim]."""
        dim = signal.shape[-1]
        table = torch.cat([linear(signal).unflatten(-1, (linear.out_features // dim, 1, dim)) for linear in linears], dim=2)
        if table.shape[2] == 2:  # the last layer says scale first
            table = table.flip(2)
        table[:, :, 1::3] += 1
        return table

    @torch.no_grad()
    def step(self, hidden_states: Tensor, prepared: Prepared, index: int) -> Tensor:
        """The velocity at step `index`."""
        length, rotation = prepared.context.shape[1], prepared.rotation
        *modulations, last = (each[index] for each in prepared.modulations)
        x = torch.cat([prepared.context, self.x_embedder(hidden_states)], dim=1)
        before = x.clone() if self.cache_threshold else None
        for place, (block, modulation) in enumerate(zip(self.blocks, modulations, strict=True)):
            block(x, length, modulation, rotation)
            if place == 0 and before is not None:
                first = x - before
                if self._reuse(prepared, first):
                    x += prepared.others
                    break
                prepared.first, before = first, x.clone()
        else:
            prepared.others = None if before is None else x - before
        return self.proj_out(modulated_norm(x[:, length:], *last.unbind(1)))

    def _reuse(self, prepared: Prepared, first: Tensor) -> bool:
        if prepared.others is None:
            change = float("inf")
        else:
            change = ((first - prepared.first).abs().mean() / prepared.first.abs().mean()).item()
        prepared.log.append(StepChange(change, reused=change < self.cache_threshold))
        return prepared.log[-1].reused

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """One pass of its own, as `FluxTransformer2DModel.forward`."""
        prepared = self.prepare(encoder_hidden_states, pooled_projections, timestep[None], img_ids, txt_ids, guidance)
        return self.step(hidden_states, prepared, index=0)
