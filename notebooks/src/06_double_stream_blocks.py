# %% [markdown]
# # 06 · Double-stream blocks: where words and picture meet
#
# After this lesson you can
#
# - compute joint attention by hand, from two streams of tokens to two streams of tokens;
# - look up, for any word, head, block and step, which places of the picture look at the word, and say what such a map
#   proves and what it does not;
# - walk through all 19 blocks: how long the vectors are, how far each block turns them, and what the picture would be if
#   the model stopped there.
#
# **Time**: half a minute to run, 60 minutes to study. **You need**: lessons 04 (RoPE) and 05 (shift, scale, gate).

# %%
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange

import flux_lab
from flux_lab import instruments
from flux_lab.instruments import (
    FLUX_1_DEV,
    Table,
    explore,
    on_meta,
    plots,
    show,
    side_by_side,
    source,
    trace,
)
from flux_lab.instruments.walk import walk
from flux_lab.instruments.words import attention_between, word_map

# %%
torch.set_grad_enabled(False)
pipe = flux_lab.load_mini()
pipe.set_progress_bar_config(disable=True)
model, mini = pipe.transformer, instruments.anatomy_of(pipe)
PROMPT = "a large shiny red sphere to the left of a small blue cube on a wooden floor"
STEPS, STEP = (
    14,
    5,
)  # the walk from noise to image has 14 steps here; we look into the one with index 5


def seeded():
    return torch.Generator().manual_seed(0)


# %% [markdown]
# ## You are here
#
# The lit box: 19 blocks, one after the other. Text tokens and image tokens go in, text tokens and image tokens come out,
# in the same numbers.

# %%
show(
    plots.pipeline_map("double_stream_blocks", shapes=(mini, FLUX_1_DEV)),
    alt="Map of the pipeline with the 19 double-stream blocks lit, inside the transformer.",
)

# %% [markdown]
# *What to see*: words come from T5 at the left; the latents and the conditioning vector of lesson 05 come in too,
# inside the transformer. Here they meet for the first time.
#
# ## The idea
#
# Two **streams** run side by side: one vector of 96 numbers (FLUX.1-dev: 3072) for each of 32 text tokens, and one for
# each of 64 image tokens. Each stream has weights of its own, as if two networks ran next to each other. They join in one
# place only, **attention**. There, both streams are put into one sequence, text first, and every token may read from
# every token:
#
# $$\text{output} = \text{softmax}\!\left(\frac{Q K^{\!\top}}{\sqrt{d}}\right) V, \qquad
# Q = \begin{bmatrix} Q_\text{text} \\ Q_\text{image} \end{bmatrix},\;
# K = \begin{bmatrix} K_\text{text} \\ K_\text{image} \end{bmatrix},\;
# V = \begin{bmatrix} V_\text{text} \\ V_\text{image} \end{bmatrix}$$
#
# Every token asks with its **query** (a row of $Q$), is found by its **key** (a row of $K$), and hands out its **value**
# (a row of $V$). A **head** does this on $d$ channels of its own: 3 heads of $d = 32$ here, 24 of $128$ in FLUX.1-dev.
# $Q, K, V$ are `[sequence, d]` for each head, the product $Q K^\top$ is `[sequence, sequence]`.
#
# ### One block, by hand
#
# We run six steps of a picture and catch what goes into block 5. Everything below is computed from these four things.

# %%
K = 5
block = model.transformer_blocks[K]


def catch(generator):
    """What goes into the block at step `STEP`."""
    caught = {}
    handle = block.register_forward_pre_hook(
        lambda module, args, given: caught.update(given), with_kwargs=True
    )
    for state in pipe.steps(PROMPT, num_inference_steps=STEPS, generator=generator):
        if state.index == STEP:
            break
    handle.remove()
    return caught


caught = catch(seeded())
image, text = caught["hidden_states"], caught["encoder_hidden_states"]
temb, rotation = caught["temb"], caught["image_rotary_emb"]

# %% tags=["nbval-check-output"]
sizes = {"text": (text, "text_stream"), "image": (image, "image_stream"), "temb": (temb, "temb")}
for name, (tensor, key) in sizes.items():
    print(
        f"{name:6} miniature {list(tensor.shape)!s:12} FLUX.1-dev {list(FLUX_1_DEV.shapes()[key])}"
    )
    assert tuple(tensor.shape) == mini.shapes()[key]
length, tokens = text.shape[1], image.shape[1]

# %% [markdown]
# **Normalise and modulate** (lesson 05). Each stream has a norm of its own, driven by the same `temb`:

# %%
image_in, image_gate, image_mlp = block.norm1(image, temb)
text_in, text_gate, text_mlp = block.norm1_context(text, temb)
attn = block.attn

# %% [markdown]
# **Project** to queries, keys and values: six linear layers, three for each stream. In the reference's names those of the
# text begin with `add_`. Then cut the 96 channels into 3 heads of 32.


# %% tags=["nbval-check-output"]
def split(x):
    return rearrange(
        x, "batch sequence (heads head_dim) -> batch sequence heads head_dim", heads=attn.heads
    )


text_q, text_k, text_v = (
    split(linear(text_in)) for linear in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
)
image_q, image_k, image_v = (
    split(linear(image_in)) for linear in (attn.to_q, attn.to_k, attn.to_v)
)
print("queries of the text", list(text_q.shape), "of the image", list(image_q.shape))
assert image_q.shape == (1, 64, 3, 32)

# %% [markdown]
# **Normalise queries and keys.** An *RMS norm* divides the $d$ numbers of a head by the root of their mean square, then
# multiplies them by learned weights. Without it a few long queries would give huge scores, and softmax would become a
# hard choice that cannot learn. Values are not normalised. How long are the queries before and after?

# %%
rows = []
for name, x, norm in (("text", text_q, attn.norm_added_q), ("image", image_q, attn.norm_q)):
    before, after = x.norm(dim=3), norm(x).norm(dim=3)
    rows.append(
        [name, *(f"{values.min():.1f} to {values.max():.1f}" for values in (before, after))]
    )
text_q, text_k = attn.norm_added_q(text_q), attn.norm_added_k(text_k)
image_q, image_k = attn.norm_q(image_q), attn.norm_k(image_k)
Table(["queries of", "length before", "length after"], rows)

# %% [markdown]
# **Join**, text first. From here on there is one sequence of 32 + 64 = 96 tokens (FLUX.1-dev: 512 + 4096). Turn queries
# and keys by their positions (lesson 04). Text tokens all sit at position 0, so they are not turned.

# %% tags=["nbval-check-output"]
q = torch.cat([text_q, image_q], dim=1)
k = torch.cat([text_k, image_k], dim=1)
v = torch.cat([text_v, image_v], dim=1)
turned_q, turned_k = attn.rope(q, k, rotation)
assert torch.equal(turned_q[:, :length], q[:, :length])
print(
    "joined",
    list(q.shape),
    " text turned by RoPE:",
    not torch.equal(turned_q[:, :length], q[:, :length]),
)

# %% [markdown]
# **Scores, then probabilities.** Every query with every key, in every head:

# %% tags=["nbval-check-output"]
scores = torch.einsum("bqhd,bkhd->bhqk", turned_q, turned_k) / 32**0.5
probabilities = scores.softmax(dim=-1)
assert torch.allclose(probabilities.sum(dim=-1), torch.ones(1, 3, 96))
print("probabilities", list(probabilities.shape), " each row sums to 1")

# %%
show(
    plots.attention_matrix(probabilities[0], length),
    alt="Three heads: square maps of 96 by 96 probabilities, parted into four quadrants by the"
    " border between text and image.",
)

# %% [markdown]
# *What to see*: four quadrants in every head. Upper left: text reads text. Upper right: text reads the picture. Lower
# left: **the picture reads the words**. Lower right: the picture reads itself; a bright diagonal means that a place
# looks at itself, slanted stripes 8 tokens apart that it looks along its own column of the 8 × 8 grid, broad blocks
# that whole regions look at whole regions. A bright column inside a quadrant is a token that all of its queries read.
# Heads differ: each has its own job.
#
# **Collect the values**, put the heads side by side again, and part the two streams. Each goes through an output
# projection of its own.

# %%
collected = torch.einsum("bhqk,bkhd->bqhd", probabilities, v)
collected = rearrange(collected, "batch sequence heads head_dim -> batch sequence (heads head_dim)")
text_out, image_out = attn.to_add_out(collected[:, :length]), attn.to_out[0](collected[:, length:])

# %% [markdown]
# **Gate, add, then the MLP**: for each stream its own, four times as wide inside (384; FLUX.1-dev 12,288), with the bend
# GELU. It sees each token alone. Norm, shift, scale and gate as before:


# %%
def behind(stream, attention, gate, norm, mlp, ff):
    stream = stream + gate[:, None] * attention
    return stream + mlp.gate[:, None] * ff(
        norm(stream) * (1 + mlp.scale[:, None]) + mlp.shift[:, None]
    )


image_by_hand = behind(image, image_out, image_gate, block.norm2, image_mlp, block.ff)
text_by_hand = behind(text, text_out, text_gate, block.norm2_context, text_mlp, block.ff_context)
text_real, image_real = block(**caught)
for name, ours, real in (("text", text_by_hand, text_real), ("image", image_by_hand, image_real)):
    print(f"{name:5} by hand − block: {(ours - real).abs().max():.1e}")
    assert torch.allclose(ours, real, atol=1e-3, rtol=1e-4)

# %% [markdown]
# That is the whole block. Next: what do its probabilities say?
#
# ### Who reads whom, in all 19 blocks
#
# We trace all probabilities of a whole run, 14 steps × 19 blocks × 3 heads, and add them up by kind of token. The prompt
# has fewer than 32 tokens; the rest is **padding**, empty tokens that fill the row.

# %%
pieces = pipe.tokenizer_2.pieces_of(pipe.tokenizer_2(PROMPT)[0].tolist())
words = pieces.index("</s>")
kept = ["*/double ??/attn/probabilities", "*/double ??/modulation/image/attn/gate"]
with trace(pipe, only=kept, probabilities=True, dtype=torch.bfloat16) as traced:
    states = list(pipe.steps(PROMPT, num_inference_steps=STEPS, generator=seeded()))
picture = states[-1].image()
print(
    STEPS * 19,
    "matrices,",
    traced.bytes // 2**20,
    "MiB;",
    words,
    "pieces of words,",
    length - words,
    "tokens of end and padding",
)

# %%
groups = {
    "words": slice(0, words),
    "end and padding": slice(words, length),
    "image": slice(length, None),
}


def matrix(step, number):
    return traced[f"step {step:02d}/double {number:02d}/attn/probabilities"][0].float()


def shares(queries):
    by_block = [attention_between(matrix(STEP, number), queries, groups) for number in range(19)]
    return {name: [share[name] for share in by_block] for name in groups}


image_reads = shares(slice(length, None))
show(
    plots.attention_shares(image_reads, [f"{number:02d}" for number in range(19)]),
    alt="One bar for each of 19 blocks: how the image tokens divide their attention among words,"
    " padding and image.",
)

# %% [markdown]
# *What to see*: in which blocks the picture reads the words most, and where it is busy with itself. And the middle colour:
# the padding is read as well. Nothing masks it.
#
# ### From a word to the picture
#
# Take the column of one word in the lower left quadrant: 64 numbers, one for each place of the picture, the share of its
# attention that this place gives to the word. Laid out as 8 × 8 it is a map. We pick a block whose maps have high peaks and
# whose gate is open: what is read behind a closed gate reaches nobody.


# %%
def maps_of(step, number, head="mean of 3"):
    heads = (
        matrix(step, number)
        if head == "mean of 3"
        else matrix(step, number)[int(head) : int(head) + 1]
    )
    return [word_map(heads, token, length, rows=8, columns=8) for token in range(words)]


labels = [f"{token} {pieces[token]}" for token in range(words)]
peaks = [torch.stack(maps_of(STEP, number)).amax(dim=(1, 2)).mean() for number in range(19)]
gates = [
    traced[f"step {STEP:02d}/double {number:02d}/modulation/image/attn/gate"].float().norm()
    for number in range(19)
]
best = max(range(19), key=lambda number: peaks[number] * gates[number])
print("block:", best)
show(
    plots.word_maps(picture, dict(zip(labels, maps_of(STEP, best), strict=True)), across=9),
    alt="The finished picture, then one small map over it for each piece of the prompt; a square"
    " marks the largest value.",
)

# %% [markdown]
# *What to see*: brighter places give the word more of their attention; each map has its own scale, the number says how
# much its brightest place gives. Does "red" light up where the red object stands? Do "left" or "floor" belong to a place?
# Compare with the picture, not with what you hope for.


# %%
red = next(label for label in labels if "red" in label)


def look(word=red, head="mean of 3", block=best, step=STEP):
    token = labels.index(word)
    return plots.word_maps(
        picture,
        {f"{word}, head: {head}, block {block}, step {step}": maps_of(step, block, head)[token]},
    )


explore(
    look,
    word=labels,
    head=["mean of 3", "0", "1", "2"],
    block=(0, 18),
    step=(0, STEPS - 1),
    alt="The map of one word over the picture, for a head, a block and a step that can be chosen.",
)

# %% [markdown]
# ### A walk through the 19 blocks
#
# Now we follow the streams through one pass (step index 5). Behind every block we ask three questions:
#
# - how **long** is a token's vector? Blocks *add* to the stream, so it tends to grow;
# - by what angle did this block **turn** it? 0° means that the block has left its direction as it was;
# - what would the picture be **if the model stopped here**? Skip all later blocks, the single-stream ones too, send the
#   image stream through the last norm and projection, take the velocity $v$, and look at the picture that it aims at,
#   $x_0 = x - \sigma v$, decoded.

# %%
walked = walk(pipe, PROMPT, step=STEP, num_inference_steps=STEPS, generator=seeded())
through = walked[:20]  # the place in front of the first block, and 19 places behind one
show(
    plots.walk_curves(through),
    alt="Three charts over 19 blocks: length of text and image tokens, angle by which each block"
    " turns them, distance of the"
    " velocity from the final one.",
)

# %% [markdown]
# *What to see*: upper chart, nothing makes text and image tokens equally long. Middle chart, a point near the zero
# line is a block that hardly turns its stream: most are copies (lesson 05). Lower chart, $|v_\text{here} -
# v_\text{end}| /
# |v_\text{end}|$: it need not reach zero, since 38 more blocks follow.

# %%
for stream in ("image", "text"):
    turns = through.turns(stream)
    print(
        f"{stream:5} turned most by {through.names[1 + int(turns.argmax())]}: {turns.max():.0f}°;"
        f" in all blocks {turns.sum():.0f}°"
    )

# %%
titles = [name.replace("embedded", "before").replace("double ", "after ") for name in through.names]
show(
    plots.stop_here(
        [*pipe.decode(through.x0, 128, 128), *pipe.decode(walked.x0[-1:], 128, 128)],
        [*titles, "after all 57"],
        across=7,
    ),
    alt="21 pictures: what the model aims at if it stops in front of the first block, behind each"
    " of the 19, and at its true end.",
)

# %% [markdown]
# *What to see*: the first picture comes from two linear layers and a norm: each token has seen itself only, so what
# it shows of the scene was in the latents already. The last one is the true prediction of this step. In between, look
# where colours of the prompt appear, and whether there is any shape yet: a light upper and a darker lower half come
# early, a hint of the cube's colour late, and the rest is left to the 38 blocks that follow. A colour that nobody
# asked for means little, for the last layer reads what was not made for it. Pictures that look alike side by side
# mean a block that added little *that the last layer can read*: it may have prepared something for later blocks.
#
# ## The real code
#
# The attention of both kinds of block. You wrote its double-stream half above, line by line:

# %%
source(flux_lab.attention.FluxAttention.forward, docstring=False)

# %%
source(flux_lab.attention.Attend, docstring=False)

# %% [markdown]
# `F.scaled_dot_product_attention` does scores, softmax and values in one step. No mask is given. And the block:

# %%
source(flux_lab.blocks.FluxTransformerBlock.forward, docstring=False)

# %% [markdown]
# ## Shapes
#
# Every named tensor of the first block, the miniature beside FLUX.1-dev. The names are those of `trace`:

# %%
side_by_side(
    mini,
    FLUX_1_DEV,
    only=["embedded/*", "double 00/attn/*", "double 00/mlp/*", "double 00/text", "double 00/image"],
)

# %% tags=["nbval-check-output"]
giant = on_meta("transformer", FLUX_1_DEV)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


parts = {
    "modulation, image": "norm1",
    "modulation, text": "norm1_context",
    "attention, both": "attn",
    "MLP, image": "ff",
    "MLP, text": "ff_context",
}
ours, theirs = model.transformer_blocks[0], giant.transformer_blocks[0]
rows = [
    [name, count(getattr(ours, part)), count(getattr(theirs, part))] for name, part in parts.items()
]
rows.append(["one block", count(ours), count(theirs)])
rows.append(["19 blocks", count(model.transformer_blocks), count(giant.transformer_blocks)])
print(Table(["parameters", "miniature", "FLUX.1-dev"], rows))

# %% [markdown]
# A wrong shape, to read the error: we hand the block T5's vectors as they come, 128 wide, without the linear layer
# `context_embedder` that brings them to 96.

# %% tags=["nbval-check-output"]
from flux_lab.shapes import ShapeError

try:
    block(**caught | {"encoder_hidden_states": torch.zeros(1, 32, 128)})
except ShapeError as error:
    print(error)

# %% [markdown]
# ## Trust, then verify
#
# The reference's block with the miniature's weights, all 19 of them, one after the other:

# %%
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock as Reference

reference = Reference(dim=96, num_attention_heads=3, attention_head_dim=32)
largest, theirs, ours = 0.0, (text, image), (text, image)
for each in model.transformer_blocks:
    reference.load_state_dict(each.state_dict(), strict=True)
    shared = {"temb": temb, "image_rotary_emb": rotation}
    theirs = reference(hidden_states=theirs[1], encoder_hidden_states=theirs[0], **shared)
    ours = each(hidden_states=ours[1], encoder_hidden_states=ours[0], **shared)
    largest = max(
        largest, *((a - b).abs().max() / b.abs().max() for a, b in zip(ours, theirs, strict=True))
    )
print(f"19 blocks in a row, largest difference relative to the largest value: {largest:.1e}")
assert largest < 1e-4

# %% [markdown]
# ## Turn the knob
#
# Stop anywhere in the 19 blocks, at any step. The left picture is what the model would aim at, the right one what it aims
# at with all its blocks.


# %%
@lru_cache
def walk_at(step):
    return walk(pipe, PROMPT, step=step, num_inference_steps=STEPS, generator=seeded())


def stop(after=9, step=STEP):
    there = walk_at(step)
    images = pipe.decode(there.x0[[after + 1, len(there) - 1]], 128, 128)
    return plots.gallery(
        images, [f"step {step}, stopped after double {after:02d}", f"step {step}, all 57 blocks"]
    )


explore(
    stop,
    after=(0, 18),
    step=(0, STEPS - 1),
    alt="Two pictures of step 5: stopped after double block 9, and with all 57 blocks.",
)

# %% [markdown]
# ## Break it
#
# Attention has four quadrants. We close one at a time, in all 19 double-stream blocks, with a mask: a query may not read
# those keys, and divides its attention among the others.
#
# **Predict first.** Which of these hurts most? *(a)* the picture cannot read the text; *(b)* the text cannot read the
# picture; *(c)* the picture cannot read itself; *(d)* nobody reads the padding.


# %%
@contextmanager
def closed(queries, keys, blocks=model.transformer_blocks):
    def hook(module, args, result):
        q, k, v = (rearrange(each, "b s h d -> b h s d") for each in args)
        allowed = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
        allowed[queries, keys] = False
        return rearrange(
            F.scaled_dot_product_attention(q, k, v, attn_mask=allowed), "b h s d -> b s h d"
        )

    handles = [each.attn.attend.register_forward_hook(hook) for each in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# %%
TEXT, IMAGE, PADDING = slice(0, length), slice(length, None), slice(words + 1, length)
ALL, NOBODY = slice(None), slice(0)
cuts = {
    "whole": (NOBODY, NOBODY),
    "(a) image ↛ text": (IMAGE, TEXT),
    "(b) text ↛ image": (TEXT, IMAGE),
    "(c) image ↛ image": (IMAGE, IMAGE),
    "(d) padding unread": (ALL, PADDING),
}
results = {}
for name, (queries, keys) in cuts.items():
    with closed(queries, keys), flux_lab.shapes.checks(enabled=False):
        results[name] = pipe(PROMPT, num_inference_steps=6, generator=seeded()).images[0]
show(
    plots.gallery(list(results.values()), list(results)),
    alt="Five pictures of the same prompt and seed: whole, and with one part of attention closed in"
    " the 19 blocks.",
)

# %% [markdown]
# *What to see*: compare each with the first. In *(a)* the words can still reach the picture, through the 38
# single-stream blocks and through CLIP's vector; what is missing shows what these two cannot make up for, with blocks
# that were trained to get tokens which have already read the words. In *(b)* the words keep their meaning from T5 but
# cannot adapt to the picture: it hardly shows. *(d)* changes little too, so little of what is read there matters:
# attention is not effect.
#
# ## Common misreadings
#
# **"The image asks and the text answers: it is cross-attention."** That was the generation before (lesson 12), where the
# text stayed as it was. Here the text reads too, and changes with the picture. The same words go into block 5, once beside
# our picture and once beside that of another seed:

# %%
other = catch(seeded().manual_seed(1))
first, _ = block(**caught)
second, _ = block(**caught | {"hidden_states": other["hidden_states"]})
change = (first - second).norm() / (first - text).norm()
print(f"what block {K} writes into the text changes by {100 * change:.0f} %")
assert change > 0

# %% [markdown]
# **"Attention ignores the padding."** It does not. FLUX passes no mask, and softmax gives every key more than nothing:

# %%
padding = [
    attention_between(matrix(STEP, number), IMAGE, {"padding": PADDING})["padding"]
    for number in range(19)
]
print(
    f"image tokens give the padding {100 * min(padding):.1f} to {100 * max(padding):.1f} % of their"
    " attention"
)
assert min(padding) > 0

# %% [markdown]
# **"Text comes first because order matters to attention."** Attention knows no order. Positions come from RoPE alone. Put
# the image first, with its positions, and every token gets the same result; the order is an agreement between the lines
# that join and the lines that part:

# %%
swapped = [torch.cat([x[:, length:], x[:, :length]], dim=1) for x in (turned_q, turned_k, v)]
result, again = attn.attend(turned_q, turned_k, v), attn.attend(*swapped)
difference = (result - torch.cat([again[:, tokens:], again[:, :tokens]], dim=1)).abs().max()
print(f"text first − image first: {difference:.1e}")
assert difference < 1e-4

# %% [markdown]
# **"An attention map shows what the word does."** Half true. It shows where the word is *read*. What is done with the
# value, and what the word does through other tokens, it does not show. To measure the effect, close the word's column
# everywhere, in all 57 blocks, and see where the velocity changes:

# %%
token = next(place for place, piece in enumerate(pieces) if "red" in piece)
x = states[STEP - 1].latents


def velocity():
    encoded = pipe.encode_prompt(PROMPT)
    return model(
        hidden_states=x,
        encoder_hidden_states=encoded.prompt_embeds,
        pooled_projections=encoded.pooled_prompt_embeds,
        timestep=torch.tensor([states[STEP].sigma]),
        guidance=torch.tensor([3.5]),
        img_ids=flux_lab.latents.prepare_latent_image_ids(rows=8, columns=8),
        txt_ids=encoded.text_ids,
    )


# %%
with closed(ALL, [token], blocks=[*model.transformer_blocks, *model.single_transformer_blocks]):
    without = velocity()
effect = rearrange((velocity() - without).norm(dim=2)[0], "(rows columns) -> rows columns", rows=8)
read = torch.stack([maps_of(STEP, number)[token] for number in range(19)]).mean(dim=0)
show(
    plots.word_maps(
        picture,
        {
            "effect: change of v, of |v|": effect / velocity().norm(dim=2).mean(),
            "attention, mean of 19": read,
        },
    ),
    alt="The picture; where the velocity changes when nobody may read the word red; where the word"
    " red is read.",
)
print(
    "correlation of the two maps:"
    f" {torch.corrcoef(torch.stack([effect.flatten(), read.flatten()]))[0, 1]:.2f}"
)

# %% [markdown]
# *What to see*: in the middle, where the word *acts*; on the right, where it is *read*. A correlation of 1 would mean the same map.
# Trust the first when you want to know what a word does.
#
# ## Your turn
#
# ### Exercise 1: the norm of queries and keys (easy, 10 minutes)
#
# `x` is `[batch, sequence, heads, head_dim]`, `weight` is `[head_dim]`. Divide every head of every token by the root of the
# mean of its squares (add 1e-6 to the mean, before the root), then multiply by the weight.


# %% tags=["exercise"]
def head_rms_norm(x, weight):
    """[batch, sequence, heads, head_dim], normalised head by head."""
    raise NotImplementedError


# %%
from flux_lab.exercises import check

check("head_rms_norm", head_rms_norm)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `x.square().mean(dim=-1, keepdim=True)` is the mean square of each head of each token.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.rsqrt(y)` is one divided by the root of `y`.
#
# </details>
# <details><summary>Hint 3</summary>
#
# No mean is taken off, and the weight is used as it is.
#
# </details>


# %% tags=["solution"]
def head_rms_norm(x, weight):
    """[batch, sequence, heads, head_dim], normalised head by head."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


# %% [markdown]
# ### Exercise 2: joint attention (medium, 20 minutes)
#
# `query`, `key` and `value` are `[batch, sequence, heads, head_dim]`, joined and turned already. The first `length` tokens
# are text. Return two tensors, text and image, each with the heads side by side: `[batch, length, heads * head_dim]` and
# `[batch, tokens, heads * head_dim]`.


# %% tags=["exercise"]
def joint_attention(query, key, value, length):
    """(text, image) behind attention, before the output projections."""
    raise NotImplementedError


# %%
check("joint_attention", joint_attention)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Scores: `torch.einsum("bqhd,bkhd->bhqk", query, key)`. What are they divided by?
#
# </details>
# <details><summary>Hint 2</summary>
#
# Softmax over the last axis: the keys. Then `torch.einsum("bhqk,bkhd->bqhd", probabilities, value)`.
#
# </details>
# <details><summary>Hint 3</summary>
#
# `rearrange(..., "batch sequence heads head_dim -> batch sequence (heads head_dim)")`, then cut at `length`.
#
# </details>


# %% tags=["solution"]
def joint_attention(query, key, value, length):
    """(text, image) behind attention, before the output projections."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[3] ** 0.5
    output = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), value)
    output = rearrange(output, "batch sequence heads head_dim -> batch sequence (heads head_dim)")
    return output[:, :length], output[:, length:]


# %% [markdown]
# ### Exercise 3: from a word to the picture (medium, 15 minutes)
#
# `probabilities` is `[heads, sequence, sequence]`: rows ask, columns are asked. Give the map `[rows, columns]` of the
# attention that the image tokens pay to the text token number `token`, averaged over heads. The first `length` tokens are
# text; image tokens run along the rows of the picture.


# %% tags=["exercise"]
def word_to_picture(probabilities, token, length, rows, columns):
    """[rows, columns]: how much each place of the picture reads the word."""
    raise NotImplementedError


# %%
check("word_to_picture", word_to_picture)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Who asks: the image tokens, from `length` to the end. Who is asked: `token`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `probabilities[:, length:, token]` is `[heads, tokens]`. Average over heads.
#
# </details>
# <details><summary>Hint 3</summary>
#
# `rearrange(..., "(rows columns) -> rows columns", rows=rows)`.
#
# </details>


# %% tags=["solution"]
def word_to_picture(probabilities, token, length, rows, columns):
    """[rows, columns]: how much each place of the picture reads the word."""
    seen = probabilities[:, length:, token].mean(dim=0)
    return rearrange(seen, "(rows columns) -> rows columns", rows=rows)


# %% [markdown]
# ## Recap
#
# 1. Two streams, text and image, with weights of their own: two norms, twice three projections, two MLPs in each block.
# 2. They join in attention only: text first, one softmax over the whole sequence, no mask, then they part again.
# 3. Queries and keys are normalised head by head, then turned by RoPE; text is not turned.
# 4. A column of the attention matrix is a map of where a word is read. Where it acts, one has to measure.
# 5. Blocks add to the streams. Behind any of them the last layer can be asked for a picture.
#
# **Next**: lesson 07 picks up the two streams behind block 18, text `[1, 32, 96]` and image `[1, 64, 96]` (FLUX.1-dev:
# `[1, 512, 3072]` and `[1, 4096, 3072]`), and makes one sequence of them.
