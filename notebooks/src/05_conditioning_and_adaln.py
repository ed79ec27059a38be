# %% [markdown]
# # 05 · Conditioning: how the network knows the time
#
# After this lesson you can
#
# - build the conditioning vector by hand from the noise level, the guidance scale and CLIP's pooled vector;
# - follow shift, scale and gate into all 57 blocks, and say which of them acts where;
# - explain why a block whose gate is zero does nothing, and why training starts there.
#
# **Time**: half a minute to run, 50 minutes to study. **You need**: lesson 00; what a layer norm and a residual
# connection are.

# %%
import copy
from contextlib import contextmanager

import torch
import torch.nn.functional as F

import flux_lab
from flux_lab import instruments
from flux_lab.instruments import FLUX_1_DEV, Table, explore, on_meta, plots, show, source, trace

torch.set_grad_enabled(False)
pipe = flux_lab.load_mini()
pipe.set_progress_bar_config(disable=True)
model, mini = pipe.transformer, instruments.anatomy_of(pipe)
PROMPT = "a large shiny red sphere to the left of a small blue cube on a wooden floor"

# %% [markdown]
# ## You are here
#
# The lit box makes one vector out of three things: the noise level $\sigma$, the guidance scale, and CLIP's pooled
# vector. No picture goes in, and no word of T5. Every block of the network reads this vector.

# %%
show(
    plots.pipeline_map("conditioning_and_adaln", shapes=(mini, FLUX_1_DEV)),
    alt="Map of the pipeline with the conditioning lit: CLIP's pooled vector goes in, and timestep and"
    " guidance, written above; one vector comes out and goes to the blocks.",
)

# %% [markdown]
# *What to see*: one arrow ends at the lit box, CLIP's vector; noise level and guidance, written above it, go in too.
# Nothing comes from the latents. `temb`, the **conditioning vector**, has the width of the network: 96 numbers here,
# 3072 in FLUX.1-dev.
#
# ## The idea
#
# The same network is asked at every noise level. At $\sigma = 1$ it must invent a scene, at $\sigma = 0.1$ it must
# sharpen edges. So it has to be told $\sigma$. One number among thousands would drown. Instead it becomes a vector
# $c$ of shape `[batch, dim]`:
#
# $$c = \text{MLP}_t\big(s(1000\,\sigma)\big) + \text{MLP}_g\big(s(1000\,g)\big) + \text{MLP}_p(p)$$
#
# with $g$ the guidance scale, $p$ the pooled vector, and $s$ a list of cosines and sines. An **MLP** is two linear
# layers with a bend (SiLU, $x \cdot \text{sigmoid}(x)$) between them. Then every **sub-layer** $f$ of a block, attention
# or MLP, is wrapped like this:
#
# $$x \leftarrow x + \text{gate} \odot f\big((1 + \text{scale}) \odot \text{LN}(x) + \text{shift}\big)$$
#
# $x$ is `[batch, tokens, dim]`. **shift**, **scale** and **gate**, each `[batch, dim]`, are one linear layer of
# $\text{SiLU}(c)$; $\odot$ multiplies channel by channel, the same for every token. LN is a layer norm. This is called
# **adaptive layer norm**, AdaLN.
#
# ### A number becomes a wave pattern
#
# $t = 1000\,\sigma$ is a number between 0 and 1000. We take 128 frequencies $w_i = 10000^{-i/128}$, from 1 down to
# nearly 1/10000, and write down $\cos(t w_i)$ for all, then $\sin(t w_i)$ for all: 256 numbers.

# %%
t = torch.linspace(0, 1000, 101)
half = 128
frequencies = 10000.0 ** (-torch.arange(half) / half)
angles = t[:, None] * frequencies[None, :]
waves = torch.cat([angles.cos(), angles.sin()], dim=1)
show(
    plots.sinusoids(t, waves),
    alt="Sinusoids: each row is a time, each column a wave. Left: cosines, right: sines; in each"
    " half fast waves first, slow ones last.",
)

# %% [markdown]
# *What to see*: each row is one time. At the left of each half the waves turn so fast that the rows drawn here, 10 apart,
# look unrelated: these channels tell $t = 500$ from $t = 501$. At the right they hardly move: these say "early" or
# "late". It is a clock with 128 hands.
#
# Why not feed in $\sigma$ itself? Look at which times get similar vectors:

# %%
sigmas = torch.linspace(1, 0.02, 50)
time_vectors = model.time_text_embed.timestep_embedder(
    flux_lab.embeddings.get_timestep_embedding(1000 * sigmas)
)
show(
    plots.likeness(
        {
            "sinusoids [256]": flux_lab.embeddings.get_timestep_embedding(1000 * sigmas),
            "after the time MLP [96]": time_vectors,
        },
        1000 * sigmas,
    ),
    alt="Two square maps of the likeness of any two times: of the sinusoids, and of the vectors"
    " after the trained MLP.",
)

# %% [markdown]
# *What to see*: the diagonal is each time with itself, always 1. Each map has a scale of its own: read off how unlike
# two times can be at most. On the left nothing is learned: neighbours are alike and likeness falls with distance, in
# the same way everywhere. On the right the trained MLP has drawn all times together; the narrower the bright band,
# the faster its answer changes there.
#
# ### Guidance comes in through the same door
#
# The guidance scale, 3.5 for instance, is multiplied by 1000 too, and gets sinusoids and an MLP of its own. It is an
# *input*. FLUX.1-schnell has no such MLP.
#
# Both numbers are multiplied by 1000 in the network's own number format. In **bfloat16**, the 16-bit format that
# FLUX.1-dev runs in, only 8 binary digits are kept. So the network is told a slightly wrong time:

# %% tags=["nbval-check-output"]
from flux_lab.scheduler import calculate_shift, default_sigmas

pipe.scheduler.set_timesteps(sigmas=default_sigmas(28), mu=calculate_shift(FLUX_1_DEV.tokens))
wanted = pipe.scheduler.timesteps
told = (wanted.bfloat16() / 1000) * 1000
print("FLUX.1-dev, 28 steps: timesteps that move in bfloat16:", int((told.float() != wanted).sum()))
print("guidance 3.5 arrives as", (torch.tensor(3.5).bfloat16() * 1000).item())

# %%
show(
    plots.rounding_errors(wanted, told.float()),
    alt="Error of the time that the network is told in bfloat16, step by step: up to a few units of"
    " 1000.",
)

# %% [markdown]
# *What to see*: between 512 and 1000 bfloat16 has steps of 4, so the time is off by up to 2; below, the steps are
# finer. The reference does the same. A "more exact" program would make other pictures.
#
# ### Three vectors, one sum
#
# Now the whole vector by hand. We do it for 28 noise levels at once: the batch axis is time here.

# %% tags=["nbval-check-output"]
pipe.scheduler.set_timesteps(sigmas=default_sigmas(28), mu=calculate_shift(mini.tokens))
schedule = pipe.scheduler.sigmas[:-1]
text = pipe.encode_prompt(PROMPT)
embed, wave = model.time_text_embed, flux_lab.embeddings.get_timestep_embedding
parts = {
    "time": embed.timestep_embedder(wave(1000 * schedule)),
    "guidance": embed.guidance_embedder(wave(1000 * torch.full((28,), 3.5))),
    "pooled text": embed.text_embedder(text.pooled_prompt_embeds.expand(28, -1)),
}
temb = parts["time"] + parts["guidance"] + parts["pooled text"]
assert torch.equal(
    temb,
    embed(1000 * schedule, torch.full((28,), 3500.0), text.pooled_prompt_embeds.expand(28, -1)),
)
print("temb: miniature", list(temb[:1].shape), "FLUX.1-dev", list(FLUX_1_DEV.shapes()["temb"]))

# %%
show(
    plots.lengths(schedule, parts | {"sum": temb}),
    alt="Length of the three vectors and of their sum against the noise level; only time and sum"
    " change.",
)

# %% [markdown]
# *What to see*: guidance and text are flat lines, because they do not depend on the time. A long vector weighs much
# in the sum; what it says lies in how it changes. The picture goes from left to right as a drawing does: from noise
# to image.
#
# ### Six signals
#
# A double-stream block (lesson 06) has two streams, image and text, and in each stream two sub-layers: attention, then
# MLP. So for each stream one linear layer makes six signals out of $c$, and in this order: shift, scale, gate for
# attention; shift, scale, gate for the MLP. A single-stream block (lesson 07) needs three.

# %% tags=["nbval-check-output"]
norm1 = model.transformer_blocks[0].norm1
signals = norm1.linear(F.silu(temb))
shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = signals.chunk(6, dim=1)
giant = on_meta("transformer", FLUX_1_DEV)
giant_linear = giant.transformer_blocks[0].norm1.linear
print(
    "linear of a double block: miniature",
    list(norm1.linear.weight.shape),
    "FLUX.1-dev",
    list(giant_linear.weight.shape),
)
assert signals.shape == (28, 6 * 96)
assert shift.shape == (28, 96)

# %% [markdown]
# What do they do to the tokens? We walk to the 15th of 28 steps, keep the image stream as it enters block 10, and follow
# it through its norm:

# %%
step, signals = 14, "step 14/double 10/modulation/image/attn"
with trace(pipe, only=["step 14/double 09/image", f"{signals}/*"]) as t_run:
    for state in pipe.steps(PROMPT, generator=torch.Generator().manual_seed(0)):
        if state.index == step:
            break
x = t_run["step 14/double 09/image"]
x_shift, x_scale = (t_run[f"{signals}/{signal}"] for signal in ("shift", "scale"))
x_normed = F.layer_norm(x, [96], eps=1e-6)
x_modulated = x_normed * (1 + x_scale[:, None]) + x_shift[:, None]
show(
    plots.token_maps(
        {"x, the stream": x[0], "LN(x)": x_normed[0], "(1 + scale) LN(x) + shift": x_modulated[0]}
    ),
    alt="64 tokens by 96 channels: as they come, normalised, and modulated. Vertical stripes are"
    " channels alike in all tokens.",
)

# %% [markdown]
# *What to see*: each panel has a scale of its own. One channel of the stream, or a few, can be far larger than all
# others; the norm gives every *token* mean 0 and standard deviation 1. The modulation then acts on whole *columns*:
# it turns channels up, down or off, and adds the same number to every token.
#
# ### All blocks, all times
#
# The signals depend on $c$ alone. So one pass with 28 noise levels as a batch shows everything that the network will
# ever be told while it draws this picture. The latents do not matter; we pass zeros.

# %%
from flux_lab.latents import prepare_latent_image_ids


def all_signals(sigmas, guidance=3.5, text=text, latents=0.0):
    """Every modulation signal, [times, dim], by name."""
    count = len(sigmas)
    with trace(model, only=["*/modulation/*", "modulation/last/*"]) as recorded:
        model(
            hidden_states=torch.full((count, 64, 64), float(latents)),
            encoder_hidden_states=text.prompt_embeds.expand(count, -1, -1),
            pooled_projections=text.pooled_prompt_embeds.expand(count, -1),
            timestep=sigmas,
            guidance=torch.full((count,), float(guidance)),
            img_ids=prepare_latent_image_ids(rows=8, columns=8),
            txt_ids=text.text_ids,
        )
    return recorded


# %%
told_blocks = all_signals(schedule)
print(
    len(told_blocks),
    "signals of shape",
    list(told_blocks["double 00/modulation/image/attn/gate"].shape),
)

# %%
NONE = torch.full_like(schedule, torch.nan)


def strength(layer, signal, stream, recorded=told_blocks):
    """Root mean square over channels, [57 blocks, times]; nothing for the MLP of single blocks."""
    double = [
        recorded[f"double {k:02d}/modulation/{stream}/{layer}/{signal}"].square().mean(dim=1).sqrt()
        for k in range(19)
    ]
    single = [
        recorded[f"single {k:02d}/modulation/{signal}"].square().mean(dim=1).sqrt()
        for k in range(38)
    ]
    return torch.stack([*double, *(single if layer == "attn" else [NONE] * 38)])


def heat_map(stream="image"):
    kinds = [(layer, signal) for layer in ("attn", "mlp") for signal in ("shift", "scale", "gate")]
    return plots.modulation_map(
        {f"{layer} {signal}": strength(layer, signal, stream) for layer, signal in kinds}, schedule
    )


# %%
explore(
    heat_map,
    stream=["image", "text"],
    alt="Six heat maps: blocks from top to bottom, noise levels from left to right; shift, scale"
    " and gate of attention and of the"
    " MLP. Above the line the 19 double blocks, below it the 38 single blocks, which have three"
    " signals only.",
)

# %% [markdown]
# *What to see*: time runs from left to right, the data flows from top to bottom, the line parts the two kinds of
# block. Single blocks have one set of signals for attention and MLP together; it stands in the upper panels, and the
# lower ones are empty there. Where a row changes from left to right, the block does another job at another time. A
# dark row in a gate panel is a block that adds little to the stream. The next cell counts those that are closed
# altogether; there may be none. Switch to the text stream: only the double blocks change; a single block tells text
# and image the same.

# %%
gates = {}
for stream in ("image", "text"):
    attention, mlp = (strength(layer, "gate", stream).nan_to_num() for layer in ("attn", "mlp"))
    for place, values in enumerate(torch.maximum(attention, mlp)):
        name = f"{stream}, double {place:02d}" if place < 19 else f"single {place - 19:02d}"
        gates[name] = values
closed = [name for name, values in gates.items() if values.max() < 1e-3]
widest = max(gates, key=lambda name: gates[name].max())
print(f"most open: {widest}, {gates[widest].max():.2f} (root mean square over channels)")
print(f"gates that stay below 0.001: {len(closed)} of {len(gates)} (19 of each stream, 38 single)")

# %% [markdown]
# ### Why "zero"
#
# The module's name is AdaLayerNorm**Zero**, for how training starts: weight and bias of the linear layer are zero, so
# shift, scale and gate are zero. A gate of zero makes the block the **identity**: $x + 0 \cdot f(\dots) = x$. We make a
# fresh random block, set only this layer to zero, and put it into the middle of a copy of our network:

# %%
from flux_lab.blocks import FluxTransformerBlock


def velocity(network, x, sigma=0.6, guidance=3.5, text=text):
    return network(
        hidden_states=x,
        encoder_hidden_states=text.prompt_embeds,
        pooled_projections=text.pooled_prompt_embeds,
        timestep=torch.tensor([sigma]),
        guidance=torch.tensor([guidance]),
        img_ids=prepare_latent_image_ids(rows=8, columns=8),
        txt_ids=text.text_ids,
    )


# %% tags=["nbval-check-output"]
torch.manual_seed(0)
newcomer = FluxTransformerBlock(dim=96, num_attention_heads=3, attention_head_dim=32)
for norm in (newcomer.norm1, newcomer.norm1_context):
    for parameter in norm.linear.parameters():
        torch.nn.init.zeros_(parameter)
grown = copy.deepcopy(model)
grown.transformer_blocks.insert(10, newcomer)
noise = torch.randn(1, 64, 64)
difference = (velocity(grown, noise) - velocity(model, noise)).abs().max().item()
print(
    "blocks:",
    len(model.transformer_blocks),
    "→",
    len(grown.transformer_blocks),
    "  largest difference:",
    difference,
)
assert difference == 0

# %% [markdown]
# Not nearly the same: the same. So a model can be *grown*: train a few blocks first, put others between them with
# closed gates, and go on training. A block whose gates are near zero does little. The miniature was grown as well,
# from 4 + 8 blocks. Its new blocks are copies of the block in front of them; their gates were not closed but given a
# small part of its work (`flux_lab/training/grow.py`), because closed ones had stayed nearly idle. Look at the maps
# again: in shift and scale, groups of rows that look alike are one old block and its copies; in the gates, the bright
# row of a group is the old block, and the darker rows below it are its copies.
#
# Can a closed block learn at all? At the start the derivative of the output by the block's inner weights is zero,
# because the gate stands in front of them. The gate's own derivative is not:

# %% tags=["nbval-check-output"]
with torch.enable_grad():
    newcomer.zero_grad()
    velocity(grown.requires_grad_(True), noise).square().sum().backward()
rows = newcomer.norm1.linear.weight.grad.chunk(6)
names = ["shift", "scale", "gate", "mlp shift", "mlp scale", "mlp gate"]
for name, gradient in zip(names, rows, strict=True):
    print(f"{name:10} learns: {bool(gradient.abs().max() > 0)}")
print("attention  learns:", bool(newcomer.attn.to_q.weight.grad.abs().max() > 0))

# %% [markdown]
# In the first step only gates move. As soon as they are open a little, all the rest learns. So each block joins in when
# it has something to say, and 57 untrained blocks do not stir the signal into noise.
#
# ## The real code
#
# The sinusoids; you wrote them above:

# %%
source(flux_lab.embeddings.get_timestep_embedding, docstring=False)

# %% [markdown]
# They are always computed in float32, whatever the network's format. Then the sum of the three vectors. The order of the
# additions matters for the last bit:

# %%
source(flux_lab.embeddings.CombinedTimestepGuidanceTextProjEmbeddings, docstring=False)

# %% [markdown]
# And the norm of a double block. It returns three things: the modulated input for attention, the gate for later, and the
# three signals of the MLP for later still.

# %%
source(flux_lab.normalization.AdaLayerNormZero, docstring=False)

# %%
source(flux_lab.normalization.modulate)

# %% [markdown]
# `scale[:, None]` gives `[batch, 1, dim]`: one row, the same for every token.
#
# ## Shapes
#
# What these linear layers cost. We count on the `meta` device:


# %% tags=["nbval-check-output"]
def modulation_parameters(network):
    return sum(
        each.numel()
        for name, each in network.named_parameters()
        if "norm" in name and "linear" in name
    )


rows = []
for name, network in (("miniature", model), ("FLUX.1-dev", giant)):
    modulation, whole = (
        modulation_parameters(network),
        sum(each.numel() for each in network.parameters()),
    )
    rows.append([name, modulation, whole, f"{100 * modulation / whole:.0f} %"])
print(Table(["model", "in modulation", "in the transformer", "share"], rows))

# %% [markdown]
# More than a quarter of FLUX.1-dev's parameters do nothing but turn $c$ into shifts, scales and gates. And $c$ does not
# depend on the picture: for a given prompt, guidance and number of steps all signals can be computed before the loop.
# Lesson 14 uses this.
#
# A wrong shape, to read the error: we forget the batch axis of the time.

# %% tags=["nbval-check-output"]
from flux_lab.shapes import ShapeError

try:
    flux_lab.embeddings.get_timestep_embedding(torch.tensor(500.0))
except ShapeError as error:
    print(error)

# %% [markdown]
# ## Trust, then verify
#
# The reference's modules, filled with the miniature's weights. They must give the same vector and the same signals:

# %%
from diffusers.models import embeddings as their_embeddings
from diffusers.models import normalization as their_norms

PAIRS = {
    "conditioning vector": (
        embed,
        their_embeddings.CombinedTimestepGuidanceTextProjEmbeddings(96, 64),
    ),
    "AdaLayerNormZero": (norm1, their_norms.AdaLayerNormZero(96)),
    "AdaLayerNormZeroSingle": (
        model.single_transformer_blocks[0].norm,
        their_norms.AdaLayerNormZeroSingle(96),
    ),
    "AdaLayerNormContinuous": (
        model.norm_out,
        their_norms.AdaLayerNormContinuous(96, 96, elementwise_affine=False, eps=1e-6),
    ),
}
for ours, reference in PAIRS.values():
    reference.load_state_dict(ours.state_dict(), strict=True)

# %%
tokens, numbers = torch.randn(28, 64, 96), (1000 * schedule, torch.full((28,), 3500.0))
inputs = dict.fromkeys(PAIRS, (tokens, temb))
inputs["conditioning vector"] = (*numbers, text.pooled_prompt_embeds.expand(28, -1))


def tensors(result):
    """All tensors of a result, one after another."""
    if torch.is_tensor(result):
        return [result]
    return [tensor for each in result for tensor in tensors(each)]


for name, (ours, reference) in PAIRS.items():
    first, *others = inputs[name]
    theirs = reference(first, emb=temb) if "Zero" in name else reference(first, *others)
    pairs = zip(tensors(ours(first, *others)), tensors(theirs), strict=True)
    difference = max((a - b).abs().max().item() for a, b in pairs)
    assert difference < 1e-4
    print(f"{name:24} largest difference {difference:.1e}")

# %% [markdown]
# ## Turn the knob
#
# One block, every channel. Choose a block and a stream, and change the guidance scale: which channels follow the time,
# which follow the guidance?


# %%
SINGLE = ["shift", "scale", "gate"]
DOUBLE = [f"{layer}/{signal}" for layer in ("attn", "mlp") for signal in SINGLE]


def one_block(block=0, stream="image", guidance=3.5):
    recorded = all_signals(schedule, guidance)
    if block < 19:
        title, path = (
            f"double block {block}, {stream} stream",
            f"double {block:02d}/modulation/{stream}",
        )
    else:
        title, path = f"single block {block - 19}", f"single {block - 19:02d}/modulation"
    picked = {name: recorded[f"{path}/{name}"] for name in (DOUBLE if block < 19 else SINGLE)}
    return plots.channel_map(picked, schedule, f"{title}, guidance {guidance}")


explore(
    one_block,
    block=(0, 56),
    stream=["image", "text"],
    guidance=(1.0, 6.0, 0.5),
    alt="Six maps of double block 0, image stream: 96 channels from top to bottom, noise levels"
    " from left to right.",
)

# %% [markdown]
# *What to see*: a horizontal stripe is a channel that is treated in the same way at all times. A stripe that changes its
# colour on the way from left to right is a channel that counts at some noise levels only. Blocks 19 to 56 are the single
# blocks.
#
# ## Break it
#
# **Predict first.** The latents have noise level $\sigma$, but we tell the network another one. If it believes that
# there is *less* noise than there is, will the picture be blurred or grainy? And if it believes that there is *more*?


# %%
@contextmanager
def told_another_time(change):
    def hook(module, args, given):
        return args, given | {"timestep": change(given["timestep"]).clamp(0, 1)}

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def drawn(steps=6):
    generator = torch.Generator().manual_seed(0)
    with flux_lab.shapes.checks(enabled=False):  # many passes: they are faster without
        return pipe(PROMPT, num_inference_steps=steps, generator=generator).images[0]


# %%
lies = {
    "the truth": lambda sigma: sigma,
    "0.7 σ": lambda sigma: 0.7 * sigma,
    "1.3 σ": lambda sigma: 1.3 * sigma,
    "always 1": torch.ones_like,
    "always 0.5": lambda sigma: torch.full_like(sigma, 0.5),
}
images = []
for change in lies.values():
    with told_another_time(change):
        images.append(drawn())
show(
    plots.gallery(images, list(lies)),
    alt="Five pictures: told the true noise level, less, more, always 1, always 0.5.",
)

# %% [markdown]
# *What to see*: every picture has the same words, seed and steps as the first. Which is grainy, and which are smooth?
# The scene is robust: even 0.7 σ and 0.5, wrong from the first step on, hardly move the objects, but change their
# size and edges. 1.3 σ cannot go beyond 1: the scene stays, and the ball loses its highlight. "Always 1" is true at
# the start only: the objects are in place, but later steps never clear the noise. Told always the same number, the
# network is right at one point of the walk only.
#
# **Predict again.** We change the order of the chunks in *every* block: what the linear layer means as shift is used as
# scale, and the other way round. Or we drop one signal. Which hurts most?


# %%
@contextmanager
def changed_signals(change):
    def hook(module, args, signals):
        groups = signals.chunk(signals.shape[1] // (3 * 96), dim=1)
        changed = [signal for group in groups for signal in change(*group.chunk(3, dim=1))]
        return torch.cat(changed, dim=1)

    ends = ("norm1.linear", "norm1_context.linear", ".norm.linear")
    linears = [part for name, part in model.named_modules() if name.endswith(ends)]
    handles = [linear.register_forward_hook(hook) for linear in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# %%
changes = {
    "as trained": lambda shift, scale, gate: (shift, scale, gate),
    "shift ↔ scale": lambda shift, scale, gate: (scale, shift, gate),
    "shift = 0": lambda shift, scale, gate: (0 * shift, scale, gate),
    "scale = 0": lambda shift, scale, gate: (shift, 0 * scale, gate),
    "gate = its mean": lambda shift, scale, gate: (shift, scale, 0 * gate + gate.mean(1, True)),
    "gate = 0": lambda shift, scale, gate: (shift, scale, 0 * gate),
}
images = []
right = velocity(model, noise)
for name, change in changes.items():
    with changed_signals(change):
        images.append(drawn())
        error = (velocity(model, noise) - right).norm() / right.norm()
    print(f"{name:16} relative error of one velocity {error:.2f}")

# %%
show(
    plots.gallery(images, list(changes)),
    alt="Six pictures: as trained, shift and scale swapped, without shift, without scale, gates"
    " flattened, gates closed.",
)

# %% [markdown]
# *What to see*: shapes fit in all six cases, and nothing raises an error. Only the errors and the pictures tell, and
# they do not rank the mistakes alike. With all gates at 0 the 57 blocks are gone: what is left is two linear layers
# and one norm, which see each token alone and no word.
#
# ## Common misreadings
#
# **"Shift, scale and gate are three factors on the block's input"**, or **"… on its output"**. Neither: shift and scale
# act on the *input* of attention and MLP, the gate on their *output*. We check it on a real block, with nothing but the
# traced tensors. Input first: queries are a linear layer of what attention was given.

# %%
k, here = 5, "double 05/modulation/image/attn/"
block = model.transformer_blocks[k]
seen = {}
handle = block.attn.register_forward_hook(
    lambda module, args, given, result: seen.update(given, output=result[0]), with_kwargs=True
)
with trace(model, only=["double 04/image", f"{here}*"]) as recorded:
    velocity(model, noise)
handle.remove()
before = recorded["double 04/image"]
shift, scale, gate = (recorded[here + signal][:, None] for signal in ("shift", "scale", "gate"))
expected = F.layer_norm(before, [96], eps=1e-6) * (1 + scale) + shift
print(
    "input of attention − (LN(x) (1 + scale) + shift):"
    f" {(seen['hidden_states'] - expected).abs().max():.1e}"
)
assert torch.allclose(seen["hidden_states"], expected, atol=1e-4)

# %% [markdown]
# Now the output: the gate multiplies what attention returns, before the stream takes it up. We find the stream between
# the two sub-layers at the input of the second norm.

# %%
handle = block.norm2.register_forward_pre_hook(lambda module, args: seen.update(between=args[0]))
velocity(model, noise)
handle.remove()
print(
    "stream behind attention − (x + gate · output):"
    f" {(seen['between'] - (before + gate * seen['output'])).abs().max():.1e}"
)
assert torch.allclose(seen["between"], before + gate * seen["output"], atol=1e-4)

# %% [markdown]
# **"The layer norm has a weight and a bias, like every layer norm."** Not here. Scale and shift come from outside, so
# the norm has nothing of its own. These are all parameters of the layer norms of a double block (the RMS norms inside
# attention, lesson 06, do have a weight):

# %% tags=["nbval-check-output"]
print(
    [
        name
        for name, _ in model.transformer_blocks[0].named_parameters()
        if "norm" in name and "attn" not in name
    ]
)

# %% [markdown]
# **"Modulation tells the blocks what the prompt says, word by word."** It knows the prompt through one vector, CLIP's
# pooled one. Other words for T5 and other latents change no signal at all:

# %% tags=["nbval-check-output"]
other_words = text._replace(
    prompt_embeds=pipe.encode_prompt("two green cones on the sand").prompt_embeds
)
other_pooled = text._replace(
    pooled_prompt_embeds=pipe.encode_prompt("two green cones on the sand").pooled_prompt_embeds
)
cases = {
    "other T5 words": all_signals(schedule, text=other_words),
    "other latents": all_signals(schedule, latents=2.0),
    "other pooled vector": all_signals(schedule, text=other_pooled),
    "other guidance": all_signals(schedule, guidance=1.5),
}
for name, signals in cases.items():
    same = all(torch.equal(signals[each], told_blocks[each]) for each in told_blocks)
    print(f"{name:20} all {len(told_blocks)} signals unchanged: {same}")

# %% [markdown]
# **"The chunks come in the same order everywhere."** In the blocks it is shift, scale, gate. The last layer of the
# network, behind all blocks, has no gate and takes **scale first**, then shift. Whoever reads it as shift, scale gets
# another velocity:

# %%
source(flux_lab.normalization.AdaLayerNormContinuous, docstring=False)

# %%
handle = model.norm_out.linear.register_forward_hook(
    lambda module, args, result: torch.cat(result.chunk(2, dim=1)[::-1], dim=1)
)
error = (velocity(model, noise) - right).norm() / right.norm()
handle.remove()
print(f"last layer read as shift, scale: relative error of the velocity {error:.2f}")
assert error > 0.01

# %% [markdown]
# ## Your turn
#
# ### Exercise 1: sinusoids of a time (easy, 10 minutes)
#
# Write the wave pattern of times `t`, `[batch]`, for any even number of `channels`. `t` is $1000\,\sigma$ already. The
# result is float32, `[batch, channels]`, whatever the format of `t`.


# %% tags=["exercise"]
def time_sinusoids(t, channels):
    """[batch] -> [batch, channels]: all cosines, then all sines."""
    raise NotImplementedError


# %%
from flux_lab.exercises import check

check("time_sinusoids", time_sinusoids)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# There are `channels // 2` frequencies, $w_i = 10000^{-i / \text{half}}$ with half = `channels // 2`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `t[:, None] * frequencies[None, :]` are the angles, `[batch, half]`. Convert `t` with `.float()` before you multiply.
#
# </details>
# <details><summary>Hint 3</summary>
#
# `torch.cat` along the last axis: cosines first.
#
# </details>


# %% tags=["solution"]
def time_sinusoids(t, channels):
    """[batch] -> [batch, channels]: all cosines, then all sines."""
    half = channels // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = t[:, None].float() * frequencies[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


# %% [markdown]
# ### Exercise 2: a modulated layer norm (easy, 10 minutes)
#
# `x` is `[batch, sequence, dim]`, `shift` and `scale` are `[batch, dim]`. Normalise each token (eps 1e-6, no weights),
# then modulate.


# %% tags=["exercise"]
def modulated(x, shift, scale):
    """The input of a sub-layer, [batch, sequence, dim]."""
    raise NotImplementedError


# %%
check("modulated", modulated)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `F.layer_norm(x, x.shape[-1:], eps=1e-6)` normalises each token over its channels.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `scale[:, None]` has the shape `[batch, 1, dim]` and fits every token.
#
# </details>
# <details><summary>Hint 3</summary>
#
# With `scale` and `shift` at zero the result must be the layer norm alone.
#
# </details>


# %% tags=["solution"]
def modulated(x, shift, scale):
    """The input of a sub-layer, [batch, sequence, dim]."""
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return normed * (1 + scale[:, None]) + shift[:, None]


# %% [markdown]
# ### Exercise 3: a gated sub-layer (medium, 15 minutes)
#
# Write the whole wrapping. `signals` is `[batch, 3 dim]`: shift, scale and gate side by side. `sublayer` is a function of
# `[batch, sequence, dim]` that stands for attention or an MLP.


# %% tags=["exercise"]
def gated_sublayer(x, signals, sublayer):
    """The stream behind the sub-layer, [batch, sequence, dim]."""
    raise NotImplementedError


# %%
check("gated_sublayer", gated_sublayer)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `signals.chunk(3, dim=1)` gives the three, in the order of the blocks.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `modulated(x, shift, scale)` from exercise 2 is what the sub-layer is given.
#
# </details>
# <details><summary>Hint 3</summary>
#
# With a gate of zero you must get `x` back, unchanged.
#
# </details>


# %% tags=["solution"]
def gated_sublayer(x, signals, sublayer):
    """The stream behind the sub-layer, [batch, sequence, dim]."""
    shift, scale, gate = signals.chunk(3, dim=1)
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x + gate[:, None] * sublayer(normed * (1 + scale[:, None]) + shift[:, None])


# %% [markdown]
# ## Recap
#
# 1. $\sigma$ and guidance, each times 1000, become 256 cosines and sines; two MLPs and a third for CLIP's pooled vector make
#    `temb`, their sum.
# 2. In every block one linear layer of SiLU(`temb`) gives shift, scale and gate: six signals a stream in a double block,
#    three in a single block.
# 3. Shift and scale act on the normalised input of attention and MLP, the gate on their output.
# 4. A gate of zero makes a block the identity. Training starts there, and new blocks can be put in without a change.
# 5. All signals depend on time, guidance and pooled text only: 27 % of FLUX.1-dev's parameters could be evaluated before
#    the loop.
#
# **Next**: lesson 06 picks up `temb`, `[1, 96]` (FLUX.1-dev: `[1, 3072]`), and two streams of tokens, and opens the
# double-stream blocks.
