"""The transformer, made to be fast: the reference's weights, fewer and larger operations, the same velocity within rounding.

- Text and image stay in one tensor from the first block to the last; a block works on it in place.
- One matrix product makes queries, keys and values; in a single-stream block also the input of the MLP.
- `prepare` does before the loop what does not depend on the picture: the modulation of all steps, the text, the rotation.
- What is left between the products is done in as few operations as possible, most of them in place: one layer norm that shifts and
  scales, one norm of queries and keys, one complex product for the rotation, one addition with the gate.
- There are no shape checks, `unflatten` takes the place of einops, and a step runs in inference mode, where a view of a tensor costs
  less: at the miniature's width all three cost about as much as the work itself.

First-block caching (off by default) changes the result: where the first block says nearly what it said at the step before, the change
that all other blocks made then is used again. Source: TeaCache (Liu et al. 2024, arXiv 2411.19108), ParaAttention's first block cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_lab.attention import FluxAttention
from flux_lab.blocks import FLOAT16_MAX, FluxSingleTransformerBlock, FluxTransformerBlock
from flux_lab.embeddings import get_timestep_embedding
from flux_lab.inference.fast_linear import FastLinear, check_plain
from flux_lab.normalization import EPS
from flux_lab.transformer import TIME_SCALE, FluxTransformer2DModel

# On a CPU, a loop over fewer numbers than that for each thread is not worth waking a second thread.
COMPILER = {"cpp.min_chunk_size": 2**14}


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm of x [batch, sequence, dim], times `scale` (to which 1 is added already) plus `shift`.

    Both are [batch, 1, dim], or [dim] for all of the batch: then they are the norm's own weight and bias, and this is one operation.
    """
    if scale.ndim == 1:
        return F.layer_norm(x, scale.shape, weight=scale, bias=shift, eps=EPS)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), scale)


def rms_weights(norm_q: nn.RMSNorm, norm_k: nn.RMSNorm) -> nn.Parameter:
    """The weights of both norms times the root of their size, [2, 1, head_dim]: see `unit_`."""
    weights = torch.stack([norm_q.weight, norm_k.weight])[:, None]
    return nn.Parameter(weights.float() * weights.shape[-1] ** 0.5, requires_grad=False)


def unit_(qk: Tensor, smallest: Tensor) -> Tensor:
    """Divide every query and key by its length, in place: [batch, sequence, 2, heads, head_dim], float32.

    x / sqrt(mean(x^2) + eps) is sqrt(d) x / sqrt(|x|^2 + d eps). That root is the hypotenuse of |x| and `smallest`, sqrt(d eps); the
    sqrt(d) is in the weights.
    """
    return qk.div_(torch.hypot(torch.linalg.vector_norm(qk, dim=-1, keepdim=True), smallest))


def rotate(qk: Tensor, rotation: Tensor) -> Tensor:
    """Turn pairs of channels: qk [batch, sequence, 2, heads, head_dim] by `rotation` [sequence, 1, 1, head_dim / 2, 2], its cos and sin.

    Both are float32.
    """
    pairs = qk.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # it knows no complex numbers
        (real, imaginary), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
        turned = torch.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation))
    return turned.flatten(-2)


def attend(qk: Tensor, value: Tensor, rotation: Tensor) -> Tensor:
    """Rotation and attention product: qk [batch, sequence, 2, heads, head_dim], float32, to [batch, sequence, heads * head_dim]."""
    query, key = rotate(qk, rotation).to(value.dtype).transpose(1, 3).unbind(2)
    return F.scaled_dot_product_attention(query, key, value.transpose(1, 2)).transpose(1, 2).flatten(2)


def gelu_(x: Tensor) -> Tensor:
    """GELU in its tanh form, in place."""
    if torch.compiler.is_compiling():  # (1 + tanh(u)) / 2 is sigmoid(2u), and the compiler's exponential is faster than its tanh
        return x.mul_(torch.sigmoid((8 / torch.pi) ** 0.5 * x * (1 + 0.044715 * x * x)))
    return torch.ops.aten.gelu_(x, approximate="tanh")


def clip_float16_(x: Tensor) -> None:
    if x.dtype == torch.float16:
        x.clamp_(-FLOAT16_MAX, FLOAT16_MAX)


class FastStream(nn.Module):
    """What a double-stream block has for one of its streams."""

    def __init__(self, attn: FluxAttention, names: Sequence[str], norms: Sequence[str], out: nn.Linear, ff: nn.Module):
        super().__init__()
        self.qkv = FastLinear(*(getattr(attn, name) for name in names))
        self.norm = rms_weights(*(getattr(attn, name) for name in norms))
        self.out, self.up, self.down = map(FastLinear, (out, ff.net[0].proj, ff.net[2]))

    def add_(self, x: Tensor, attended: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, mlp_gate: Tensor) -> None:
        x.addcmul_(gate, self.out(attended))
        x.addcmul_(mlp_gate, self.down(gelu_(self.up(modulated_norm(x, shift, scale)))))


class FastBlock(nn.Module):
    """Changes x [batch, sequence, dim], text first, in place, by its number of `signals`, each [batch, 1, dim] or [dim]."""

    signals: int

    def __init__(self, attn: FluxAttention):
        super().__init__()
        head_dim = attn.norm_q.weight.numel()
        self.split = (3, attn.heads, head_dim)
        self.register_buffer("smallest", torch.tensor((EPS * head_dim) ** 0.5, device=attn.norm_q.weight.device))


class FastTransformerBlock(FastBlock):
    """Double-stream block: six signals of the text, six of the image."""

    signals = 12

    def __init__(self, block: FluxTransformerBlock):
        super().__init__(block.attn)
        added = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
        self.text = FastStream(block.attn, *added, out=block.attn.to_add_out, ff=block.ff_context)
        self.image = FastStream(block.attn, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), out=block.attn.to_out[0], ff=block.ff)

    def forward(self, x: Tensor, length: int, signals: Sequence[Tensor], rotation: Tensor) -> None:
        text, image = x[:, :length], x[:, length:]
        projected = [self.text.qkv(modulated_norm(text, *signals[0:2])), self.image.qkv(modulated_norm(image, *signals[6:8]))]
        qkv = torch.cat(projected, dim=1).unflatten(-1, self.split)
        # In float32 from here to the end of the rotation: a copy where qkv is not.
        qk = unit_(qkv[:, :, :2].float(), self.smallest)
        qk[:, :length].mul_(self.text.norm)
        qk[:, length:].mul_(self.image.norm)
        attended = attend(qk, qkv[:, :, 2], rotation)
        self.text.add_(text, attended[:, :length], *signals[2:6])
        self.image.add_(image, attended[:, length:], *signals[8:12])
        clip_float16_(text)


class FastSingleTransformerBlock(FastBlock):
    """Single-stream block: three signals. `length` is not used."""

    signals = 3

    def __init__(self, block: FluxSingleTransformerBlock):
        super().__init__(block.attn)
        self.qkv_mlp = FastLinear(block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp)
        self.norm = rms_weights(block.attn.norm_q, block.attn.norm_k)
        self.proj_out = FastLinear(block.proj_out)

    def forward(self, x: Tensor, length: int, signals: Sequence[Tensor], rotation: Tensor) -> None:
        shift, scale, gate = signals
        dim = x.shape[-1]
        hidden = self.qkv_mlp(modulated_norm(x, shift, scale))
        qkv = hidden[..., : 3 * dim].unflatten(-1, self.split)
        qk = unit_(qkv[:, :, :2].float(), self.smallest).mul_(self.norm)
        # Attention goes where the values were, which lie beside the MLP: so both are side by side without a copy.
        hidden[..., 2 * dim : 3 * dim] = attend(qk, qkv[:, :, 2], rotation)
        gelu_(hidden[..., 3 * dim :])
        both = hidden.flatten(0, 1)[:, 2 * dim :]
        x.addcmul_(gate, self.proj_out(both).view_as(x))
        clip_float16_(x)


@dataclass
class StepChange:
    """How much the first block said otherwise than before, relative, and whether the other blocks were left out for it."""

    change: float
    reused: bool


@dataclass
class Prepared:
    """What the passes of one generation have in common.

    `context` [batch, length, dim]; `modulation`, the signals of all blocks and of the last layer, [steps, batch, 1, signals, dim], for a
    single picture [steps, signals, dim]; `rotation` [sequence, 1, 1, head_dim / 2, 2]. The rest is for caching: what the first block and
    all others added at the last full step.
    """

    context: Tensor
    modulation: Tensor
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
        of_doubles = [norm.linear for block in doubles for norm in (block.norm1_context, block.norm1)]
        self.modulations = nn.ModuleList([*of_doubles, *(block.norm.linear for block in singles), model.norm_out.linear])
        check_plain(self.modulations)
        ends = list(accumulate(block.signals for block in self.blocks))
        self._order = [(block, slice(end - block.signals, end)) for block, end in zip(self.blocks, ends, strict=True)]
        # All blocks in one graph: block by block, entering 57 compiled functions would cost what they gain.
        self._run = torch.compile(self._run_blocks, dynamic=False, options=COMPILER) if compile else self._run_blocks

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
        return Prepared(self.context_embedder(encoder_hidden_states), self._modulation(signal), torch.stack([cos, sin], dim=-1))

    def _modulation(self, signal: Tensor) -> Tensor:
        """What all adaptive norms say at all steps, in the blocks' order, with 1 added to every scale: see `Prepared`."""
        tables = [linear(signal).unflatten(-1, (1, -1, signal.shape[-1])) for linear in self.modulations]
        tables[-1] = tables[-1].flip(-2)  # the last layer says scale first
        table = torch.cat(tables, dim=-2)
        table[..., 1::3, :] += 1  # shift, scale, gate, shift, scale, gate, ..., and shift, scale of the last layer
        return table[:, 0, 0] if table.shape[1] == 1 else table

    @torch.no_grad()
    def step(self, hidden_states: Tensor, prepared: Prepared, index: int) -> Tensor:
        """The velocity at step `index`."""
        with torch.inference_mode():
            row, rotation = prepared.modulation[index], prepared.rotation
            x = torch.cat([prepared.context, self.x_embedder(hidden_states)], dim=1)
            length = prepared.context.shape[1]
            if self.cache_threshold:
                self._run_cached(x, length, row, rotation, prepared)
            else:
                self._run(x, length, row, rotation, 0, len(self.blocks))
            velocity = self.proj_out(modulated_norm(x[:, length:], *row[..., -2:, :].unbind(-2)))
        return velocity.clone()  # a plain tensor, with which everything is allowed

    def _run_blocks(self, x: Tensor, length: int, row: Tensor, rotation: Tensor, first: int, last: int) -> None:
        """Change x by the blocks from `first` to before `last`. `row`: what all norms say at this step."""
        signals = row.unbind(-2)
        for block, place in self._order[first:last]:
            block(x, length, signals[place], rotation)

    def _run_cached(self, x: Tensor, length: int, row: Tensor, rotation: Tensor, prepared: Prepared) -> None:
        """The first block, then the others, or what they added at the last full step."""
        before = x.clone()
        self._run(x, length, row, rotation, 0, 1)
        first = x - before
        if self._reuse(prepared, first):
            x += prepared.others
            return
        prepared.first, before = first, x.clone()
        self._run(x, length, row, rotation, 1, len(self.blocks))
        prepared.others = x - before

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
