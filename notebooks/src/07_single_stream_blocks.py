# %% [markdown]
# # 07 · Single-stream blocks: one sequence, one set of weights
#
# After this lesson you can
#
# - compute a single-stream block by hand: attention and MLP side by side, one projection, one gate;
# - walk through all 38 blocks, with the picture that each of them would aim at;
# - measure, rather than guess, what the text tokens still do here.
#
# **Time**: half a minute to run, 50 minutes to study. **You need**: lesson 06 (joint attention, the walk).

# %%
from contextlib import ExitStack, contextmanager, nullcontext
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange

import flux_lab
from flux_lab import instruments
from flux_lab.instruments import (
    FLUX_1_DEV,
    Table,
    ablate,
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
singles = model.single_transformer_blocks
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
# The lit box: 38 blocks, behind the 19 double-stream blocks of lesson 06.

# %%
show(
    plots.pipeline_map("single_stream_blocks", shapes=(mini, FLUX_1_DEV)),
    alt="Map of the pipeline with the 38 single-stream blocks lit, the last box inside the"
    " transformer before the velocity.",
)

# %% [markdown]
# *What to see*: what leaves this box goes through one more norm and one projection, and is the velocity.
#
# ## The idea
#
# Text and image tokens have lived in two streams so far, with weights of their own. Now they become **one sequence** $s$,
# text first: `[batch, 32 + 64, 96]` here, `[batch, 512 + 4096, 3072]` in FLUX.1-dev. One set of weights treats both
# alike. And inside the block attention and MLP do not stand one behind the other. They stand **side by side**: both
# read the same input $h$, and one matrix $W$ takes up both results.
#
# $$h = (1 + \text{scale}) \odot \text{LN}(s) + \text{shift}$$
# $$m = \text{GELU}(W_\text{mlp}\, h + b_\text{mlp})$$
# $$s \leftarrow s + \text{gate} \odot \big( W\, [\,\text{Attention}(h),\; m\,] + b \big)$$
#
# Square brackets put channels side by side: 96 from attention and 384 from the MLP make 480 (FLUX.1-dev: 3072 + 12,288 =
# 15,360). $W$ is `[96, 480]` (`[3072, 15360]`). There is one norm and one gate, so three modulation signals suffice.
#
# Why so? One norm and one large product in place of several small ones keep a graphics card busier, and one set of
# weights for both kinds of token costs half of two.
#
# ### One block, by hand
#
# We run to step 5 and catch what goes into single block 10.

# %%
K = 10
block, caught = singles[K], {}
handle = block.register_forward_pre_hook(
    lambda module, args, given: caught.update(given), with_kwargs=True
)
for state in pipe.steps(PROMPT, num_inference_steps=STEPS, generator=seeded()):
    if state.index == STEP:
        break
handle.remove()
text, image, temb = caught["encoder_hidden_states"], caught["hidden_states"], caught["temb"]

# %% [markdown]
# **Join** and **normalise**. One linear layer gives shift, scale and gate, for text and image the same:

# %% tags=["nbval-check-output"]
sequence = torch.cat([text, image], dim=1)
length = text.shape[1]
shift, scale, gate = block.norm.linear(F.silu(temb))[:, None].chunk(3, dim=2)
h = F.layer_norm(sequence, [96], eps=1e-6) * (1 + scale) + shift
print(
    "sequence: miniature", list(sequence.shape), "FLUX.1-dev", list(FLUX_1_DEV.shapes()["sequence"])
)
assert tuple(sequence.shape) == mini.shapes()["sequence"]

# %% [markdown]
# **Attention** on the whole sequence. As in lesson 06: split into heads, RMS norm of queries and keys, RoPE, softmax. Only
# there is one set of projections now, and no output projection: that is part of $W$.


# %% tags=["nbval-check-output"]
def split(x):
    return rearrange(x, "batch sequence (heads head_dim) -> batch sequence heads head_dim", heads=3)


attn = block.attn
q, k, v = attn.norm_q(split(attn.to_q(h))), attn.norm_k(split(attn.to_k(h))), split(attn.to_v(h))
q, k = attn.rope(q, k, caught["image_rotary_emb"])
attention = rearrange(
    attn.attend(q, k, v), "batch sequence heads head_dim -> batch sequence (heads head_dim)"
)
print("attention", list(attention.shape))

# %% [markdown]
# **MLP**, at the same time, on the same $h$. Here it is only its first half: widen, bend.

# %% tags=["nbval-check-output"]
mlp = F.gelu(block.proj_mlp(h), approximate="tanh")
side_by = torch.cat([attention, mlp], dim=2)
print(
    "MLP",
    list(mlp.shape),
    " side by side",
    list(side_by.shape),
    " W",
    list(block.proj_out.weight.shape),
)
assert side_by.shape == (1, 96, 96 + 384)

# %% [markdown]
# **Project, gate, add, part.** Compare with the real block:

# %%
result = sequence + gate * block.proj_out(side_by)
real_text, real_image = block(**caught)
difference = (result - torch.cat([real_text, real_image], dim=1)).abs().max()
print(f"by hand − block: {difference:.1e}")
assert torch.allclose(result[:, length:], real_image, atol=1e-3, rtol=1e-4)

# %%
show(
    plots.token_maps(
        {
            "h, what both read": h[0],
            "attention gives": attention[0],
            "MLP gives (384 channels)": mlp[0],
        }
    ),
    alt="Three maps, 96 tokens by channels: the modulated input, the result of attention, the"
    " inside of the MLP.",
)

# %% [markdown]
# *What to see*: rows 0 to 31 are text, 32 to 95 image; in which panels does the border show, although the weights are
# the same? Attention gives averages of values: rows are alike where tokens read the same places, and differ where
# they read different ones. The MLP sees each row alone. GELU lets positive numbers through and presses negative ones
# to nearly zero: its panel never gets below −0.17.
#
# ### One matrix is two
#
# $W$ has 480 columns. The first 96 read attention, the others the MLP: $W[a, m] = W_a a + W_m m$. So the update is a sum,
# and we can ask which part is larger, block by block. **Predict**: will attention or the MLP move the tokens more?

# %%
seams = [
    f"single ??/{name}"
    for name in ("text", "image", "attn/attended", "mlp/hidden", "modulation/gate")
]
with trace(pipe, only=[f"step {STEP:02d}/{seam}" for seam in seams]) as traced:
    for state in pipe.steps(PROMPT, num_inference_steps=STEPS, generator=seeded()):
        if state.index == STEP:
            break


def part(number, which, tokens):
    """Mean length of one part of a block's update, relative to the token behind the block."""
    here = f"step {STEP:02d}/single {number:02d}/"
    attended, hidden = traced[here + "attn/attended"].flatten(2), traced[here + "mlp/hidden"]
    weight = singles[number].proj_out.weight
    update = attended @ weight[:, :96].T if which == "attention" else hidden @ weight[:, 96:].T
    stream = torch.cat([traced[here + "text"], traced[here + "image"]], dim=1)
    update = traced[here + "modulation/gate"][:, None] * update
    return (update.norm(dim=2) / stream.norm(dim=2))[:, tokens].mean().item()


# %%
numbers = [f"{number:02d}" for number in range(38)]
kinds = {"image": slice(length, None), "text": slice(0, length)}
curves = {
    f"{which}, {kind} tokens": [part(number, which, tokens) for number in range(38)]
    for kind, tokens in kinds.items()
    for which in ("attention", "MLP")
}
show(
    plots.curves_by_block(curves, numbers, "length of the update\nrelative to the token"),
    alt="Four curves over 38 blocks: how much attention and the MLP add to image tokens and to text"
    " tokens.",
)
for name, values in curves.items():
    print(
        f"{name:24} sum over 38 blocks {sum(values):.2f}, largest in block"
        f" {max(range(38), key=values.__getitem__)}"
    )

# %% [markdown]
# *What to see*: a value of 0.1 means that this part adds a vector a tenth as long as the token. Points near the zero
# line are blocks whose gates are nearly closed. Compare image with text: the same weights, so any difference comes
# from the tokens.
#
# ### A walk through the 38 blocks
#
# The same three questions as in lesson 06: how long, by what angle turned, and how far from the final velocity is the
# velocity that the last layer reads off here?

# %%
walked = walk(pipe, PROMPT, step=STEP, num_inference_steps=STEPS, generator=seeded())
through = walked[19:]  # behind double block 18, and behind each of the 38
show(
    plots.walk_curves(through),
    alt="Three charts over 38 blocks: length of the tokens, angle by which each block turns them,"
    " distance to the final velocity.",
)
for stream in ("image", "text"):
    turns = through.turns(stream)
    print(
        f"{stream:5} turned most by {through.names[1 + int(turns.argmax())]}: {turns.max():.0f}°;"
        f" in all blocks {turns.sum():.0f}°"
    )

# %% [markdown]
# *What to see*: the lower curve ends at 0, because behind block 37 the last layer reads the true velocity. Does it
# fall evenly, or in steps, and at which blocks? Compare them with the peaks of the chart above it. In the middle
# chart compare the two streams: once the words have been read, their own tokens need not change any more.

# %%
titles = [
    name.replace("double 18", "before").replace("single ", "after ") for name in through.names
]
show(
    plots.stop_here(pipe.decode(through.x0, 128, 128), titles, across=10),
    alt="39 pictures: what the model aims at if it stops in front of the first single block, and"
    " behind each of the 38.",
)

# %% [markdown]
# *What to see*: read it like a comic strip. The last picture is what this step truly aims at. Where do the colours of
# the objects come, where their edges? Two neighbours that look equal: a block that wrote next to nothing which the
# last layer reads.
#
# ### What the text tokens still do
#
# Behind block 37 the text tokens are thrown away; only image tokens become a velocity. So what are 32 text tokens good
# for in these 38 blocks? First: are they read? For each block, how the *image* tokens divide their attention:

# %%
pieces = pipe.tokenizer_2.pieces_of(pipe.tokenizer_2(PROMPT)[0].tolist())
words = pieces.index("</s>")
with trace(
    pipe, only="*/single ??/attn/probabilities", probabilities=True, dtype=torch.bfloat16
) as seen:
    states = list(pipe.steps(PROMPT, num_inference_steps=STEPS, generator=seeded()))
picture = states[-1].image()


def matrix(step, number):
    return seen[f"step {step:02d}/single {number:02d}/attn/probabilities"][0].float()


# %%
groups = {
    "words": slice(0, words),
    "end and padding": slice(words, length),
    "image": slice(length, None),
}
by_block = [
    attention_between(matrix(STEP, number), slice(length, None), groups) for number in range(38)
]
show(
    plots.attention_shares(
        {name: [shares[name] for shares in by_block] for name in groups}, numbers
    ),
    alt="One bar for each of 38 blocks: how the image tokens divide their attention among words,"
    " padding and image.",
)

# %% [markdown]
# *What to see*: how much of each bar is text. Being read is not yet having an effect. So second, we **measure the effect**
# on the velocity, one block at a time:
#
# - *skipped*: the block hands on both kinds of token unchanged;
# - *text held*: it works, but the text tokens leave it as they came;
# - *image ↛ text*: image tokens may not read text in this block.


# %%
@contextmanager
def unread(blocks, queries=slice(length, None), keys=slice(0, length)):
    """These queries may not read these keys."""

    def hook(module, args, result):
        q, k, v = (rearrange(each, "b s h d -> b h s d") for each in args)
        allowed = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
        allowed[queries, keys] = False
        return rearrange(
            F.scaled_dot_product_attention(q, k, v, attn_mask=allowed), "b h s d -> b s h d"
        )

    with ExitStack() as stack:
        for each in blocks:
            stack.callback(each.attn.attend.register_forward_hook(hook).remove)
        yield


# %% [markdown]
# That makes 3 × 38 changed networks. They need not run one by one: in front of the changed block all are equal to the
# whole network. So **one growing batch** goes through the 38 blocks. Its first row is the whole network. At each block
# three rows join it: copies of the first row, changed in this block. `walked` holds the streams to begin with.

# %%
start = walked.text[19:20], walked.image[19:20]  # in front of the first single block


def run(each, text, image):
    around = {"temb": temb.expand(len(text), -1), "image_rotary_emb": caught["image_rotary_emb"]}
    return each(hidden_states=image, encoder_hidden_states=text, **around)


def velocity(image):
    return model.proj_out(model.norm_out(image, temb.expand(len(image), -1)))


# %%
def all_changed():
    """Velocities [1 + 3 * 38, tokens, 64]: of the whole network, then three for each block."""
    text, image = start
    for each in singles:
        text_before, image_before = text[:1], image[:1]
        with unread([each]):
            text_unread, image_unread = run(each, text_before, image_before)
        text, image = run(each, text, image)
        text = torch.cat([text, text_before, text_before, text_unread])
        image = torch.cat([image, image_before, image[:1], image_unread])
    return velocity(image)


def effect(changed):
    """Change of the velocity, relative."""
    return ((changed - whole).flatten(1).norm(dim=1) / whole.norm()).tolist()


# %%
whole, *_ = velocities = all_changed().split(1)
changes = effect(torch.cat(velocities[1:]))
kinds = ("skipped", "text held", "image ↛ text")
effects = {kind: changes[place::3] for place, kind in enumerate(kinds)}


def all_blocks(change):
    """The effect of changing all 38 blocks."""
    text, image = start
    with change:
        for each in singles:
            text, image = run(each, text, image)
    return effect(velocity(image))[0]


# %%
show(
    plots.curves_by_block(effects, numbers, "change of the velocity\n(relative)"),
    alt="Three curves over 38 blocks: the change of the velocity when a block is skipped, holds its"
    " text, or hides it from the image.",
)
all_held = all_blocks(ablate(model, stream={"single *": "text"}))
all_unread = all_blocks(unread(singles))
print(f"all 38 at once: text held {all_held:.2f}, image may not read text {all_unread:.2f}")

# %% [markdown]
# *What to see*: the distance between the curves. Where "skipped" is high and the others are low, the block works on the
# picture alone. "image ↛ text" is what the words still say to the picture there; "text held" is what it matters that the
# words go on changing. The last line compares both for all blocks together.
#
# One point of these curves we know without measuring. What text does in the *last* block can change nothing: nobody comes
# after it to read.

# %% tags=["nbval-check-output"]
print(f"text held in single block 37, change of the velocity: {effects['text held'][37]:.4f}")
assert effects["text held"][37] < 1e-5

# %% [markdown]
# ## The real code

# %%
source(flux_lab.blocks.FluxSingleTransformerBlock, docstring=False)

# %% [markdown]
# The block takes two streams and hands back two, so that the network can call it like a double block. Inside it joins
# them, and parts them again at `length`. `FluxAttention` is the same class as in lesson 06; `pre_only` leaves out the
# output projection. Its norm:

# %%
source(flux_lab.normalization.AdaLayerNormZeroSingle, docstring=False)

# %% [markdown]
# ## Shapes

# %%
side_by_side(mini, FLUX_1_DEV, only=["single 00/*", "last/image", "velocity"])

# %% [markdown]
# And the parameters, beside those of a double block:


# %% tags=["nbval-check-output"]
def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


giant = on_meta("transformer", FLUX_1_DEV)
rows = []
for name, part_of in {
    "one double block": lambda m: m.transformer_blocks[0],
    "one single block": lambda m: m.single_transformer_blocks[0],
    "19 double blocks": lambda m: m.transformer_blocks,
    "38 single blocks": lambda m: m.single_transformer_blocks,
}.items():
    rows.append([name, count(part_of(model)), count(part_of(giant))])
print(Table(["parameters", "miniature", "FLUX.1-dev"], rows))

# %% [markdown]
# A wrong shape, to read the error: text and image of different width cannot become one sequence.

# %% tags=["nbval-check-output"]
from flux_lab.shapes import ShapeError

try:
    block(**caught | {"encoder_hidden_states": torch.zeros(1, 32, 128)})
except ShapeError as error:
    print(error)

# %% [markdown]
# ## Trust, then verify
#
# The reference's block with the miniature's weights, all 38 in a row:

# %%
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock as Reference

reference = Reference(dim=96, num_attention_heads=3, attention_head_dim=32)
shared = {"temb": temb, "image_rotary_emb": caught["image_rotary_emb"]}
largest, theirs, ours = 0.0, (text, image), (text, image)
for each in singles:
    reference.load_state_dict(each.state_dict(), strict=True)
    theirs = reference(hidden_states=theirs[1], encoder_hidden_states=theirs[0], **shared)
    ours = each(hidden_states=ours[1], encoder_hidden_states=ours[0], **shared)
    largest = max(
        largest, *((a - b).abs().max() / b.abs().max() for a, b in zip(ours, theirs, strict=True))
    )
print(f"38 blocks in a row, largest difference relative to the largest value: {largest:.1e}")
assert largest < 1e-4

# %% [markdown]
# ## Turn the knob
#
# Any word, in any head of any single block, at any step: which places of the picture read it?

# %%
labels = [f"{token} {pieces[token]}" for token in range(words)]
red = next(label for label in labels if "red" in label)
matters = max(range(38), key=effects["image ↛ text"].__getitem__)  # reading matters most there


def look(word=red, head="mean of 3", block=matters, step=STEP):
    heads = slice(0, 3) if head == "mean of 3" else slice(int(head), int(head) + 1)
    probabilities = matrix(step, block)[heads]
    seen_at = word_map(probabilities, labels.index(word), length, rows=8, columns=8)
    return plots.word_maps(picture, {f"{word}, head: {head}, single {block}, step {step}": seen_at})


explore(
    look,
    word=labels,
    head=["mean of 3", "0", "1", "2"],
    block=(0, 37),
    step=(0, STEPS - 1),
    alt="The map of the word red over the picture, averaged over the heads of a single block.",
)

# %% [markdown]
# And stop anywhere in the 38 blocks, at any step:


# %%
@lru_cache
def walk_at(step):
    return walk(pipe, PROMPT, step=step, num_inference_steps=STEPS, generator=seeded())


def stop(after=18, step=STEP):
    there = walk_at(step)
    images = pipe.decode(there.x0[[20 + after, len(there) - 1]], 128, 128)
    return plots.gallery(
        images, [f"step {step}, stopped after single {after:02d}", f"step {step}, all 57 blocks"]
    )


explore(
    stop,
    after=(0, 37),
    step=(0, STEPS - 1),
    alt="Two pictures of step 5: stopped after single block 18, and with all 57 blocks.",
)

# %% [markdown]
# ## Break it
#
# **Predict first**, then look. In all 38 single-stream blocks, for the whole walk from noise to image, in 6 steps: *(a)* attention
# gives nothing, only the MLP works; *(b)* the MLP gives nothing, only attention works; *(c)* the text tokens stay as the
# double blocks left them; *(d)* the image may not read the text. In which of the four will you still recognise the scene?


# %%
@contextmanager
def without_mlp():
    with ExitStack() as stack:
        for each in singles:
            stack.callback(
                each.act_mlp.register_forward_hook(
                    lambda module, args, result: torch.zeros_like(result)
                ).remove
            )
        yield


# %%
breaks = {
    "whole": nullcontext(),
    "(a) no attention": ablate(pipe, heads={"single *": range(3)}),
    "(b) no MLP": without_mlp(),
    "(c) text held": ablate(pipe, stream={"single *": "text"}),
    "(d) image ↛ text": unread(singles),
}
results = {}
for name, change in breaks.items():
    with change, flux_lab.shapes.checks(enabled=False):  # many passes: they are faster without
        results[name] = pipe(PROMPT, num_inference_steps=6, generator=seeded()).images[0]

# %%
show(
    plots.gallery(list(results.values()), list(results)),
    alt="Five pictures of one prompt and seed: whole, without attention, without MLP, text held,"
    " and text hidden, in the 38 blocks.",
)

# %% [markdown]
# *What to see*: compare each with the first. In *(a)* every image token works alone in these blocks: do neighbouring
# places still fit together, above all where an object should be? In *(c)* the words are still read, as they were at
# the start. What *(c)* and *(d)* change is what the text tokens do here.
#
# ## Common misreadings
#
# **"After the double-stream blocks the text has done its work."** It is read in every block, and softmax gives each of
# its tokens more than nothing. Whether that matters is measured above, and here in one number:

# %%
print(f"velocity without reading text in the 38 blocks: changes by {100 * all_unread:.0f} %")
assert all_unread > 0

# %% [markdown]
# **"Side by side or one after the other, that is the same."** No. One after the other, the MLP would read what attention
# has just written. We compute it both ways, in the block whose input we caught:


# %%
def one_after_the_other(sequence):
    """Attention's part is added first; the MLP reads the new sequence. The block's weights."""
    h, gate = block.norm(sequence, temb)
    attended = block.attn(hidden_states=h, image_rotary_emb=caught["image_rotary_emb"])
    attention_weight, mlp_weight = block.proj_out.weight.split([96, 384], dim=1)
    sequence = sequence + gate[:, None] * (attended @ attention_weight.T)
    hidden = block.act_mlp(block.proj_mlp(block.norm(sequence, temb)[0]))
    return sequence + gate[:, None] * (hidden @ mlp_weight.T + block.proj_out.bias)


# %%
real = torch.cat(block(**caught), dim=1)
change = (one_after_the_other(sequence) - real).norm() / (real - sequence).norm()
print(f"block {K}: one after the other changes the update by {100 * change:.0f} %")
assert change > 1e-3

# %% [markdown]
# **"38 against 19: most of FLUX.1-dev is in the single blocks."** Most of the blocks, not of the parameters. A double block
# has two of nearly everything:

# %% tags=["nbval-check-output"]
everything = count(giant)
for name, blocks in (
    ("double", giant.transformer_blocks),
    ("single", giant.single_transformer_blocks),
):
    print(
        f"{len(blocks)} {name} blocks: {count(blocks):13,} parameters,"
        f" {100 * count(blocks) / everything:.0f} % of FLUX.1-dev"
    )

# %% [markdown]
# **"A single block has one stream, so there is no text and image any more."** The weights do not know which is which. The
# tokens do: text sits at position 0 (lesson 04), and carries what 19 blocks have written into it. The network counts on
# the border at the end: it parts the sequence at `length`, and only what stands behind it becomes a velocity.
#
# ## Your turn
#
# ### Exercise 1: attention and MLP side by side (medium, 15 minutes)
#
# Write the end of a single-stream block. `sequence` and `attention` are `[batch, sequence, dim]`; `mlp` is `[batch,
# sequence, hidden]` and has been through GELU; `weight` is `[dim, dim + hidden]`, `bias` `[dim]`, `gate` `[batch, dim]`.


# %% tags=["exercise"]
def parallel_update(sequence, attention, mlp, weight, bias, gate):
    """The sequence behind the block, [batch, sequence, dim]."""
    raise NotImplementedError


# %%
from flux_lab.exercises import check

check("parallel_update", parallel_update)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Put attention and MLP side by side, along the last axis. Which comes first?
#
# </details>
# <details><summary>Hint 2</summary>
#
# `F.linear(x, weight, bias)` is the projection.
#
# </details>
# <details><summary>Hint 3</summary>
#
# `gate[:, None]` fits every token. With a gate of zero you must get `sequence` back.
#
# </details>


# %% tags=["solution"]
def parallel_update(sequence, attention, mlp, weight, bias, gate):
    """The sequence behind the block, [batch, sequence, dim]."""
    update = F.linear(torch.cat([attention, mlp], dim=2), weight, bias)
    return sequence + gate[:, None] * update


# %% [markdown]
# ### Exercise 2: by how much a block turns its tokens (easy, 10 minutes)
#
# `before` and `after` are `[batch, tokens, dim]`. Give the angle between each token before and after, in degrees, averaged
# over all tokens: a tensor without axes.


# %% tags=["exercise"]
def direction_change(before, after):
    """The mean angle in degrees, a tensor without axes."""
    raise NotImplementedError


# %%
check("direction_change", direction_change)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The cosine of the angle of two vectors is their dot product divided by both lengths. `F.cosine_similarity(before, after,
# dim=2)` gives it for every token.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `.acos()` gives the angle in radians, `.rad2deg()` turns it into degrees. Rounding can push a cosine past 1: clamp it.
#
# </details>
# <details><summary>Hint 3</summary>
#
# Average at the very end, over the angles.
#
# </details>


# %% tags=["solution"]
def direction_change(before, after):
    """The mean angle in degrees, a tensor without axes."""
    cosine = F.cosine_similarity(before, after, dim=2).clamp(-1, 1)
    return cosine.acos().rad2deg().mean()


# %% [markdown]
# ### Exercise 3: how much does the picture read the text? (medium, 10 minutes)
#
# `probabilities` is `[heads, sequence, sequence]`; rows ask, columns are asked; the first `length` tokens are text. Give the
# share of their attention that image tokens give to all text tokens together, averaged over image tokens and heads: a
# tensor without axes, between 0 and 1.


# %% tags=["exercise"]
def text_share(probabilities, length):
    """The mean share, a tensor without axes."""
    raise NotImplementedError


# %%
check("text_share", text_share)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# One quadrant of each matrix: the image's rows, the text's columns.
#
# </details>
# <details><summary>Hint 2</summary>
#
# A share is a *sum* over the keys that belong to it.
#
# </details>
# <details><summary>Hint 3</summary>
#
# Then the mean over everything that is left: heads and queries.
#
# </details>


# %% tags=["solution"]
def text_share(probabilities, length):
    """The mean share, a tensor without axes."""
    return probabilities[:, length:, :length].sum(dim=2).mean()


# %% [markdown]
# ## Recap
#
# 1. Text and image become one sequence, text first; one set of weights treats all tokens alike.
# 2. Attention and MLP read the same modulated input; one projection takes up both; one gate closes both. Three signals.
# 3. The projection is a sum of two, so the parts of attention and MLP can be measured apart.
# 4. Text tokens go on being read and changed up to block 37. What they do there is measured by holding or hiding them; in
#    the last block what becomes of them changes nothing.
# 5. In FLUX.1-dev 38 single blocks hold fewer parameters than 19 double blocks.
#
# **Next**: lesson 08 picks up the image tokens behind block 37, `[1, 64, 96]` (FLUX.1-dev: `[1, 4096, 3072]`), and puts the
# whole network together.
