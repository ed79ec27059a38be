# %% [markdown]
# # 04 · RoPE: positions as rotations
#
# After this lesson you can
#
# - turn a query and a key by their positions, by hand, and say why only the difference counts;
# - read the table of rotations of a whole sequence: which channel follows which axis, and how fast;
# - predict what happens to the picture when the position ids are zeroed, exchanged or shifted.
#
# **Time**: half a minute to run, 60 minutes to study. **You need**: lesson 03, sine and cosine.

# %%
import contextlib
import math

import torch
from einops import rearrange

import flux_lab
from flux_lab import instruments
from flux_lab.instruments import FLUX_1_DEV, Table, explore, plots, show, source, trace
from flux_lab.latents import pack_latents, prepare_latent_image_ids, prepare_noise
from flux_lab.rope import FluxPosEmbed, apply_rotary_emb, get_1d_rotary_pos_embed
from flux_lab.transformer import ROPE_THETA

torch.set_grad_enabled(False)  # nothing is trained here
pipe = flux_lab.load_mini()
pipe.set_progress_bar_config(disable=True)
mini = instruments.anatomy_of(pipe)  # its sizes

# %% [markdown]
# ## You are here
#
# The box *positions* is lit. In go the position ids of all tokens, text first: `[96, 3]`, 32 text and 64 image tokens. Out
# come a cosine and a sine for every token and channel of an attention head: `[96, 32]` each. In FLUX.1-dev it is
# `[4608, 3]` and `[4608, 128]`. The table is made once for a pass, and all 57 blocks use it.

# %%
show(
    plots.pipeline_map("rope", shapes=(mini, FLUX_1_DEV)),
    alt="Map of the pipeline. Lit: the box of positions, RoPE, at the entrance of the transformer.",
)

# %% [markdown]
# ## The idea
#
# **Attention** lets tokens look at each other (lesson 06). It works in several **heads**. In a head every token $m$ has
# a **query** $q_m$ and a **key** $k_m$, vectors of `head_dim` numbers: 32 in the miniature, 128 in FLUX.1-dev. The
# **score** says how much token $m$ looks at token $n$:
#
# $$s_{mn} = \frac{q_m \cdot k_n}{\sqrt{\text{head\_dim}}}$$
#
# Nothing in this formula knows where a token is. **RoPE**, rotary position embedding (Su et al. 2021), puts it in: it
# turns every query and every key by an angle that grows with the position. Two channels, a **pair**, are an arrow in a
# plane. At position $p$ it is turned by $p\,\omega$:
#
# $$\begin{pmatrix} x_0' \\ x_1' \end{pmatrix} =
# \begin{pmatrix} \cos p\omega & -\sin p\omega \\ \sin p\omega & \cos p\omega \end{pmatrix}
# \begin{pmatrix} x_0 \\ x_1 \end{pmatrix}$$
#
# $p$ is a count, without a unit; $\omega$, the **frequency**, is an angle in radians for each position.
#
# ### One pair
#
# Move the position. Then choose another pair: each has a frequency of its own.


# %%
def one_pair(position=5, pair=1):
    frequency = ROPE_THETA ** (-2 * pair / 14)  # an axis of 14 channels has 7 pairs
    return plots.turning_pair((1.0, 0.3), frequency, position)


explore(
    one_pair,
    position=(0, 24),
    pair=(0, 6),
    alt="Left: an arrow in a plane, turned step by step up to position 5. Right: its two numbers,"
    " two waves.",
)

# %% [markdown]
# *What to see*: the arrow's length never changes. Pair 0 turns by 1 radian for each position and is round after 6.28;
# pair 6 hardly moves.
#
# ### Only the difference counts
#
# Turn two arrows by the same angle, and the angle between them stays. So the product of a query at position 3 and a key
# at position 10 is that of 103 and 110. We take random vectors:

# %%
q, k = torch.randn(2, 14, generator=torch.Generator().manual_seed(1))


def at(position, x):
    """A vector, turned as at this position."""
    table = get_1d_rotary_pos_embed(len(x), torch.tensor([float(position)]))
    return apply_rotary_emb(x[None, None, None], table)[0, 0, 0]


scores = {pair: (at(pair[0], q) @ at(pair[1], k)).item() for pair in ((3, 10), (103, 110), (3, 11))}
for (of_query, of_key), score in scores.items():
    print(f"query at {of_query:3}, key at {of_key:3}: product {score:8.5f}")
assert abs(scores[3, 10] - scores[103, 110]) < 1e-4
assert abs(scores[3, 10] - scores[3, 11]) > 1e-2

# %% [markdown]
# ### A ladder of frequencies
#
# One frequency is not enough. A fast pair tells neighbours apart, but after a full turn it repeats. A slow pair does not
# repeat, but hardly tells neighbours apart. So every pair of an axis has its own frequency, each slower than the one
# before by the same factor. With $D$ channels there are $D/2$ pairs:
#
# $$\omega_i = \theta^{-2i/D}, \qquad i = 0, 1, \ldots, D/2 - 1, \qquad \theta = 10000.$$
#
# A position in FLUX has three numbers: (0, row, column). Each has channels of its own in every head, an **axis** of
# RoPE, and its own ladder.

# %% tags=["nbval-check-output"]
rows = []
for anatomy in (mini, FLUX_1_DEV):
    for name, dim in zip(
        ("unused", "row", "column"), anatomy.transformer.axes_dims_rope, strict=True
    ):
        turns = [2 * math.pi * ROPE_THETA ** (2 * pair / dim) for pair in (0, dim // 2 - 1)]
        rows.append([anatomy.name, name, dim, dim // 2, f"{turns[0]:.2f}", f"{turns[1]:,.0f}"])
print(
    Table(
        ["", "axis", "channels", "pairs", "fastest: full turn after", "slowest: full turn after"],
        rows,
    )
)

# %%
sides = {"miniature": 8, "FLUX.1-dev": 64}
ladders = {anatomy.name: anatomy.transformer.axes_dims_rope for anatomy in (mini, FLUX_1_DEV)}
show(
    plots.frequency_ladders(ladders, sides, ROPE_THETA),
    alt="Positions for a full turn against the pair of the head, on a logarithmic scale, for both"
    " models:"
    " three ladders that each begin at 6.28 and rise to thousands.",
)

# %% [markdown]
# *What to see*: three ladders in each head, and each begins anew at 6.28 positions. FLUX.1-dev has finer rungs, and
# for row and column its ladders are only a little longer. A pair above the dotted line does not get round once within
# the picture.
#
# ### The table
#
# `FluxPosEmbed` makes the cosines and sines of all tokens. Text tokens have the id (0, 0, 0).

# %% tags=["nbval-check-output"]
LENGTH = mini.length  # text tokens
text_ids, image_ids = torch.zeros(LENGTH, 3), prepare_latent_image_ids(rows=8, columns=8)
ids = torch.cat([text_ids, image_ids])
cos, sin = pipe.transformer.pos_embed(ids)
print("ids", list(ids.shape), "cos", list(cos.shape), "sin", list(sin.shape))
assert (cos[:LENGTH] == 1).all()
assert (sin[:LENGTH] == 0).all()
assert (cos[:, 0::2] == cos[:, 1::2]).all()

# %%
show(
    plots.rotation_table(cos, sin, mini.transformer.axes_dims_rope, LENGTH),
    alt="Cosine and sine of 96 tokens and 32 channels. Text rows and the first four channels:"
    " cosine 1, sine 0."
    " Row channels change every eight tokens, column channels at every token.",
)

# %% [markdown]
# *What to see*: two channels always agree, a pair. Upper part: text is not turned at all, cosine 1 and sine 0. In the
# image the channels of the row change every eight tokens, those of the column at every token. To the right in each axis
# the changes become slow. The first four channels never turn.
#
# ### Score against distance
#
# How does distance alone change a score? We take a query and a key of ones. Whatever differs then comes from RoPE. The
# query stays at (0, 0, 0), the key moves along one axis.


# %%
def turned(x, ids, axes_dim=mini.transformer.axes_dims_rope):
    """Vectors [tokens, head_dim], each turned as its id says."""
    table = FluxPosEmbed(ROPE_THETA, axes_dim)(ids)
    return apply_rotary_emb(x[None, :, None], table)[0, :, 0]


def along(axis, anatomy, count):
    ids = torch.zeros(count, 3)
    ids[:, axis] = torch.arange(float(count))
    keys = turned(
        torch.ones(count, anatomy.transformer.attention_head_dim),
        ids,
        anatomy.transformer.axes_dims_rope,
    )
    return keys.mean(dim=1)


# %%
names = ("along the unused axis", "along the rows", "along the columns")
curves = {}
for anatomy in (mini, FLUX_1_DEV):
    count = 3 * sides[anatomy.name]  # three pictures wide
    curves[anatomy.name] = {name: along(axis, anatomy, count) for axis, name in enumerate(names)}
show(
    plots.score_curves(curves, sides),
    alt="Score against distance for three axes, two models: all fall from 1 and then wave; rows and"
    " columns agree.",
)

# %% [markdown]
# *What to see*: the score is highest at distance 0 and falls fast, then it waves: where the fast pairs have turned round, it
# rises again. Rows and columns have the same curve, dashed on solid. No curve falls to 0 here: while one axis moves, the
# channels of the other two still agree. The unused axis would work like the others, but all ids have 0 there.
#
# Now both axes at once, for a query in the picture, and for a text token:


# %%
def seen_from(place, anatomy, side):
    """Scores of a query of ones at a place, keys of ones everywhere, as shares of the highest."""
    dim, axes_dim = anatomy.transformer.attention_head_dim, anatomy.transformer.axes_dims_rope
    query = turned(torch.ones(1, dim), torch.tensor([place]), axes_dim)
    keys = turned(torch.ones(side**2, dim), prepare_latent_image_ids(side, side), axes_dim)
    return rearrange(keys @ query[0] / dim, "(rows columns) -> rows columns", rows=side)


# %%
maps = {
    "miniature: from (0, 3, 4)": seen_from((0.0, 3.0, 4.0), mini, 8),
    "FLUX.1-dev: from (0, 24, 40)": seen_from((0.0, 24.0, 40.0), FLUX_1_DEV, 64),
    "FLUX.1-dev: from text (0, 0, 0)": seen_from((0.0, 0.0, 0.0), FLUX_1_DEV, 64),
}
marks = dict(zip(maps, ((3, 4), (24, 40), (0, 0)), strict=True))
show(
    plots.place_maps(maps, "score, as a share of the highest", marks),
    alt="Three maps of scores: a bright cross around the place of the query in the miniature and in"
    " FLUX.1-dev;"
    " for a text token the bright place is the upper left corner.",
)

# %% [markdown]
# *What to see*: a bright cross, broad in the miniature. Its arms are the places in the same row or column, where one of the two axes agrees
# entirely. For a text token the cross lies in the upper left corner: text sits at the same place as image token (0, 0, 0).
# Trained queries and keys are not ones, so a head may turn this pattern into many others.
#
# ### Why text sits at zero
#
# Words have no row and no column, so any place would be arbitrary. Zero is the one that turns nothing. It has two
# consequences. First: RoPE says nothing about the *order* of words. If we shuffle the text tokens, the velocity stays the
# same. The order is known all the same, because T5 has worked it into its vectors (lesson 02).

# %%
PROMPT = "a large shiny red sphere to the left of a small blue cube on a wooden floor"
text = pipe.encode_prompt(PROMPT)
x = pack_latents(prepare_noise(mini.shapes()["latents"], torch.Generator().manual_seed(0)))


def velocity(x=x, words=text.prompt_embeds, txt_ids=text_ids, img_ids=image_ids):
    return pipe.transformer(
        hidden_states=x,
        encoder_hidden_states=words,
        pooled_projections=text.pooled_prompt_embeds,
        timestep=torch.tensor([0.8]),
        guidance=torch.tensor([3.5]),
        img_ids=img_ids,
        txt_ids=txt_ids,
    )


# %%
def apart(first, second):
    """The largest difference, as a share of the largest number."""
    return ((first - second).abs().max() / second.abs().max()).item()


plain = velocity()
order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(2))
swapped = pipe.encode_prompt(
    "a large shiny blue sphere to the left of a small red cube on a wooden floor"
)
shuffled, other = (
    velocity(words=text.prompt_embeds[:, order]),
    velocity(words=swapped.prompt_embeds),
)
print(f"text tokens shuffled:            velocity differs by {apart(shuffled, plain):.1e}")
print(f"two words of the prompt swapped: velocity differs by {apart(other, plain):.1e}")
assert apart(shuffled, plain) < 1e-3

# %% [markdown]
# The first number is rounding: the same sums in another order. Second consequence: seen from the text, every image token
# has its own distance, (row, column). So the place in the picture is known to the network, not only the distance of two
# patches. We come back to that under *Break it*.
#
# ## The real code
#
# One axis first. `repeat` writes each cosine twice, for both channels of the pair.

# %%
source(get_1d_rotary_pos_embed, docstring=False)

# %% [markdown]
# The three axes, side by side:

# %%
source(FluxPosEmbed, docstring=False)

# %% [markdown]
# And the turning. It holds two forms of one rotation. The **real** form, which FLUX uses, adds to $x \cos$ a copy of $x$
# turned by a quarter, times $\sin$: the quarter turn of $(x_0, x_1)$ is $(-x_1, x_0)$. The **complex** form reads a pair as
# the number $x_0 + i\,x_1$ and multiplies it by $e^{i p \omega}$.

# %%
source(apply_rotary_emb, docstring=False)

# %% [markdown]
# Both forms, and the formula for one pair by hand:

# %%
positions = torch.arange(8.0)
some = torch.randn(
    2, 8, 3, 14, generator=torch.Generator().manual_seed(3)
)  # batch, sequence, heads, head_dim
real = apply_rotary_emb(some, get_1d_rotary_pos_embed(14, positions))
complex_ = apply_rotary_emb(some, get_1d_rotary_pos_embed(14, positions, use_real=False))
p, i = 5, 2  # a position and a pair
angle = p * ROPE_THETA ** (-2 * i / 14)
x0, x1 = some[0, p, 0, 2 * i : 2 * i + 2]
by_hand = torch.stack(
    [x0 * math.cos(angle) - x1 * math.sin(angle), x0 * math.sin(angle) + x1 * math.cos(angle)]
)
print(f"largest difference: real and complex {(real - complex_).abs().max():.1e}")
print(
    "                    real and by hand"
    f" {(real[0, p, 0, 2 * i : 2 * i + 2] - by_hand).abs().max():.1e}"
)
assert torch.allclose(real, complex_, atol=1e-5)
assert torch.allclose(real[0, p, 0, 2 * i : 2 * i + 2], by_hand, atol=1e-5)

# %% [markdown]
# ### Why the angles are computed in float64
#
# The code computes angles in float64 and keeps cosines and sines in float32. What if the angles were computed in fewer
# digits? An angle is position times frequency, so its error grows with the position. We compare with cosines computed
# in float64 throughout.

# %%
positions = 2.0 ** torch.arange(13)  # 1, 2, 4, ... 4096
frequencies = ROPE_THETA ** (-torch.arange(0, 56, 2, dtype=torch.float64) / 56)
exact = torch.outer(positions.double(), frequencies).cos()
errors = {}
for name, dtype in (
    ("float64", torch.float64),
    ("float32", torch.float32),
    ("bfloat16", torch.bfloat16),
):
    cosines, _ = get_1d_rotary_pos_embed(56, positions, freqs_dtype=dtype)
    errors[f"frequencies in {name}"] = (cosines[:, ::2].double() - exact).abs().amax(dim=1)
show(
    plots.rounding(positions, errors, marks={"1024 pixels": 64, "4096 pixels": 256}),
    alt="Largest error of a cosine against the position, both logarithmic: flat and tiny for"
    " float64, rising for float32, and rising to 2 for bfloat16.",
)

# %% [markdown]
# *What to see*: with float64 the error is that of writing a float32 number, at every position. With float32 it grows with
# the position, still small at the sizes of FLUX. In bfloat16, a format of 16 bits with fewer than three decimal digits,
# the angles of far tokens would be worthless. The table is made once for a pass, so float64 costs next to nothing.
#
# The ids themselves are kept in the model's format, as upstream keeps them. In bfloat16 whole numbers are exact up to 256
# only. Rows 256 and 257 of a picture of more than 4096 pixels get the same id:

# %% tags=["nbval-check-output"]
tall = prepare_latent_image_ids(rows=258, columns=1, dtype=torch.bfloat16)
print("rows 255, 256, 257 in bfloat16:", tall[255:, 1].tolist())
assert tall[256, 1] == tall[257, 1]

# %% [markdown]
# ## Shapes
#
# Ids, table, queries. FLUX.1-dev runs on the `meta` device, where tensors have a shape and no memory.

# %% tags=["nbval-check-output"]
rows = []
for anatomy in (mini, FLUX_1_DEV):
    network, sequence = anatomy.transformer, anatomy.length + anatomy.tokens
    empty = torch.empty(sequence, 3, device="meta")
    table = FluxPosEmbed(ROPE_THETA, network.axes_dims_rope)(empty)
    queries = torch.empty(
        1, sequence, network.num_attention_heads, network.attention_head_dim, device="meta"
    )
    result = apply_rotary_emb(queries, table)
    assert result.shape == queries.shape
    assert table[0].shape == (sequence, sum(network.axes_dims_rope))
    rows.append(
        [anatomy.name, *(str(list(each.shape)) for each in (empty, table[0], queries, result))]
    )
print(Table(["", "ids", "cos, sin", "queries", "turned"], rows))

# %% [markdown]
# What does not fit: ids of two numbers, a table for 96 tokens on 64 queries, an axis of 7 channels.

# %% tags=["nbval-check-output"]
for wrong in (
    lambda: pipe.transformer.pos_embed(ids[:, 1:]),
    lambda: apply_rotary_emb(torch.zeros(1, 64, 3, 32), (cos, sin)),
    lambda: get_1d_rotary_pos_embed(7, torch.arange(8.0)),
):
    try:
        wrong()
    except ValueError as error:
        print(f"{type(error).__name__}: {error}")

# %% [markdown]
# ## Trust, then verify
#
# The reference is `diffusers`: its table for both models, and its turning of the miniature's queries.

# %%
from diffusers.models.embeddings import apply_rotary_emb as reference_apply
from diffusers.models.transformers.transformer_flux import FluxPosEmbed as ReferencePosEmbed

for anatomy in (mini, FLUX_1_DEV):
    side, dims = sides[anatomy.name], anatomy.transformer.axes_dims_rope
    all_ids = torch.cat([torch.zeros(anatomy.length, 3), prepare_latent_image_ids(side, side)])
    ours, theirs = (kind(ROPE_THETA, dims)(all_ids) for kind in (FluxPosEmbed, ReferencePosEmbed))
    difference = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    print(f"{anatomy.name:10} table {list(ours[0].shape)}: largest difference {difference}")
    assert difference == 0

queries = torch.randn(1, 96, 3, 32, generator=torch.Generator().manual_seed(4))
ours = apply_rotary_emb(queries, (cos, sin))
theirs = reference_apply(queries, (cos, sin), sequence_dim=1)
difference = (ours - theirs).abs().max().item()
print(f"turned queries: largest difference {difference}")
assert difference < 1e-6

# %% [markdown]
# ## Turn the knob
#
# What did the *trained* heads make of this? We look into a drawing half-way and take the queries and keys of all blocks,
# before they are turned. The mean over all image tokens, turned by every possible distance, shows what distance alone adds to a
# score in this head.

# %%
with trace(pipe, only=["step 04/*/attn/q", "step 04/*/attn/k"]) as run:
    pipe(PROMPT, num_inference_steps=8, generator=torch.Generator().manual_seed(0))
blocks = [name.split("/")[1] for name in run.names("*/attn/q")]
distances = prepare_latent_image_ids(15, 15) - torch.tensor(
    [0.0, 7.0, 7.0]
)  # -7 ... 7 on both axes


def by_distance(block, head):
    """Score of the mean image query with the mean image key, for each distance."""
    q, k = (run[f"step 04/{block}/attn/{name}"][0, LENGTH:, head].mean(dim=0) for name in "qk")
    scores = turned(k.expand(len(distances), -1), distances) @ q / math.sqrt(len(q))
    return rearrange(scores, "(rows columns) -> rows columns", rows=15)


# %%
spread = {
    block: max(by_distance(block, head).std().item() for head in range(3)) for block in blocks
}
strongest = max(spread, key=spread.get)
print(
    f"of {len(blocks)} blocks, distance counts most in {strongest}, least in"
    f" {min(spread, key=spread.get)}"
)


def heads_of(block=strongest):
    maps = {f"{block}, head {head}": by_distance(block, head) for head in range(3)}
    return plots.place_maps(maps, "score", centred=True)


explore(
    heads_of,
    block=blocks,
    alt="Three maps, one for each head of a block: the score against the distance of key and"
    " query.",
)

# %% [markdown]
# *What to see*: the middle is distance 0. A bright spot there: the head prefers near tokens. A bright bar: it prefers
# its own row or column. A spot beside the middle: it looks in one direction. The same again 6 patches away: the
# fastest pair has gone round once (6.28). Small differences on the scale: in this head, distance hardly counts. All
# of it is made with the same table.
#
# ## Break it
#
# Now we hand the network wrong ids, without changing anything else. **Predict first**, for each, what you will get:
#
# 1. *zeros*: all tokens have the id (0, 0, 0);
# 2. *exchanged*: row and column are exchanged in all ids;
# 3. *image shifted*: 5 is added to row and column of the image tokens; the text stays at 0;
# 4. *all shifted*: 5 is added to row and column of all tokens, text too.


# %%
@contextlib.contextmanager
def changed_ids(change):
    """Inside the `with` block the network gets other ids. A hook changes them on their way in."""
    hook = pipe.transformer.pos_embed.register_forward_pre_hook(
        lambda module, args: (change(args[0]),)
    )
    try:
        yield
    finally:
        hook.remove()


# %%
SHIFT = torch.tensor([0.0, 5.0, 5.0])
CHANGES = {
    "as trained": lambda ids: ids,
    "zeros": torch.zeros_like,
    "exchanged": lambda ids: ids[:, [0, 2, 1]],
    "image shifted": lambda ids: torch.cat([ids[:LENGTH], ids[LENGTH:] + SHIFT]),
    "all shifted": lambda ids: ids + SHIFT,
}

# %%
drawn, velocities = {}, {}
for name, change in CHANGES.items():
    with changed_ids(change):
        generator = torch.Generator().manual_seed(0)
        drawn[name] = pipe(
            PROMPT, num_inference_steps=16, generator=generator, output_type="latent"
        ).images
        velocities[name] = velocity()
    print(f"{name:14} one velocity differs by {apart(velocities[name], plain):.1e}")
images = pipe.decode(torch.cat(list(drawn.values())), height=128, width=128)
show(
    plots.gallery(images, list(CHANGES)),
    alt="The prompt drawn with ids " + ", ".join(CHANGES) + ". The last equals the first.",
)
assert apart(velocities["all shifted"], plain) < 1e-3 < apart(velocities["image shifted"], plain)

# %% [markdown]
# *What to see*, from right to left:
#
# - *all shifted*: the same picture. Every difference of positions is as before. What is left is rounding.
# - *image shifted*: the image tokens have their old distances to each other, but new distances to the text. The
#   scene does not just move, it breaks.
# - *exchanged*: the network takes rows for columns. Look for a floor that stands upright.
# - *zeros*: the network cannot know which token lies beside which.
#
# Three of these can be proved. **Image shifted**: scores of the first block, before and after.

# %%
q, k = (run[f"step 04/double 00/attn/{name}"][0, :, 0] for name in "qk")


def scores_with(ids):
    return turned(q, ids) @ turned(k, ids).T / math.sqrt(q.shape[1])


change = (scores_with(CHANGES["image shifted"](ids)) - scores_with(ids)).abs()
parts = {"text": slice(0, LENGTH), "image": slice(LENGTH, None)}
largest = {(a, b): change[parts[a], parts[b]].max().item() for a in parts for b in parts}
for (query, key), value in largest.items():
    print(f"query of {query:5} key of {key:5}: the score changes by up to {value:.1e}")
assert max(largest["text", "text"], largest["image", "image"]) < 1e-3 < largest["image", "text"]

# %% [markdown]
# Only the scores between text and image change. **Zeros**: if the ids do not tell the image tokens apart, the network
# treats all places alike. Shuffle the image tokens that go in, and the velocities come out in the shuffled order:

# %%
order = torch.randperm(64, generator=torch.Generator().manual_seed(5))
for name in ("zeros", "as trained"):
    with changed_ids(CHANGES[name]):
        difference = apart(velocity(x[:, order]), velocity(x)[:, order])
    print(f"{name:10} shuffled in, shuffled out: differs by {difference:.1e}")
    assert (difference < 1e-3) == (name == "zeros")

# %% [markdown]
# So with zeros a picture has no neighbours: it is a bag of patches. **Exchanged**: a picture drawn with exchanged ids is an
# ordinary picture whose tokens lie mirrored at the diagonal. We mirror the tokens back:


# %%
def mirrored(tokens):
    """Tokens with rows and columns exchanged; the numbers inside each stay."""
    return rearrange(
        tokens, "batch (rows columns) channels -> batch (columns rows) channels", rows=8
    )


usual = mirrored(velocity(mirrored(x)))
with changed_ids(CHANGES["exchanged"]):
    difference = apart(velocity(x), usual)
print(
    f"exchanged ids, and mirrored tokens with the usual ids: velocities differ by {difference:.1e}"
)
assert difference < 1e-3
pictures = pipe.decode(
    torch.cat([drawn["exchanged"], mirrored(drawn["exchanged"])]), height=128, width=128
)
show(
    plots.gallery(pictures, ["drawn with exchanged ids", "the same tokens, mirrored back"]),
    alt="The picture drawn with exchanged ids, and its tokens mirrored back: an ordinary scene.",
)

# %% [markdown]
# *What to see*: the right picture is an ordinary one, drawn from mirrored noise. And a last doubt is settled: if the
# columns of the ids were colours, exchanging two of them would change colours. It exchanges directions.
#
# ## Common misreadings
#
# **"RoPE adds a position vector to the tokens."** Older transformers do that. Here nothing is added. Queries and keys are
# turned, so they keep their length, and the values, which carry the content, are not touched:

# %%
keys = run["step 04/double 00/attn/k"]
after = apply_rotary_emb(keys, (cos, sin))
lengths, lengths_after = keys.norm(dim=-1), after.norm(dim=-1)
print(
    f"keys change by up to {(after - keys).abs().max():.2f}, their lengths by"
    f" {(lengths_after - lengths).abs().max():.1e}"
)
assert torch.allclose(lengths_after, lengths, rtol=1e-4)
source(pipe.transformer.transformer_blocks[0].attn.rope, docstring=False)

# %% [markdown]
# `Rope` takes queries and keys, and no values.
#
# **"With RoPE, far tokens get low scores."** Only if query and key point in the same direction, and even then the curve
# waves. A head may learn a key that is turned back by 5 positions. Then the best match is 5 patches away:

# %%
ones = torch.ones(56)
apart_by = range(32)
equal = [(ones @ at(distance, ones) / 56).item() for distance in apart_by]
ahead = [(ones @ at(distance, at(-5, ones)) / 56).item() for distance in apart_by]
print("highest score at distance", equal.index(max(equal)), "and", ahead.index(max(ahead)))
assert ahead.index(max(ahead)) == 5
curves = {"equal query and key": equal, "key turned back by 5": ahead}
show(
    plots.score_curves({"one axis of FLUX.1-dev, 56 channels": curves}),
    alt="Two curves of score against distance: one has its peak at distance 0, the other at"
    " distance 5.",
)

# %% [markdown]
# *What to see*: the same curve, moved by 5. RoPE does not prefer near tokens. It makes distance visible, and training decides.
#
# **"The first of the three numbers counts the text tokens, or the steps."** In FLUX.1 it is 0 for every token, text and
# image, at every step. Its channels never turn:

# %% tags=["nbval-check-output"]
for anatomy in (mini, FLUX_1_DEV):
    side, dims = sides[anatomy.name], anatomy.transformer.axes_dims_rope
    all_ids = torch.cat([torch.zeros(anatomy.length, 3), prepare_latent_image_ids(side, side)])
    cosines, _ = FluxPosEmbed(ROPE_THETA, dims)(all_ids)
    still = (cosines == 1).all(dim=0).sum().item()
    print(f"{anatomy.name:10} {still} of {sum(dims)} channels of a head never turn")
    assert still == dims[0]

# %% [markdown]
# These channels compare content without regard to place. A later model of the family, FLUX.1 Kontext, uses the number: it
# gives 1 to the tokens of a second picture, one to be edited.
#
# **"RoPE knows only distances, so the network cannot know where in the picture a token is."** Distances between *which*
# tokens? All text sits at zero, and is a fixed point for all. *Break it* has measured it: shift the image alone, and the
# velocity changes; shift everything, and it does not.

# %% tags=["nbval-check-output"]
changed = {name: apart(velocities[name], plain) > 1e-3 for name in ("image shifted", "all shifted")}
print("the velocity changes:", changed)
assert changed == {"image shifted": True, "all shifted": False}

# %% [markdown]
# ## Your turn
#
# ### Exercise 1: the ladder (easy, 10 minutes)
#
# Give the frequencies of an axis of `dim` channels: a float64 tensor `[dim / 2]`, in radians for one position, the fastest
# first.


# %% tags=["exercise"]
def rope_frequencies(dim, theta):
    """The angle that each pair turns for one position."""
    raise NotImplementedError


# %%
from flux_lab.exercises import check

check("rope_frequencies", rope_frequencies)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The formula is above: theta to the power of -2i/dim. How many values does i take?
#
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.arange(0, dim, 2, dtype=torch.float64)` is 2i for all pairs.
#
# </details>
# <details><summary>Hint 3</summary>
#
# For dim = 4 and theta = 100 the frequencies are 1 and 0.1.
#
# </details>


# %% tags=["solution"]
def rope_frequencies(dim, theta):
    """The angle that each pair turns for one position."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


# %% [markdown]
# ### Exercise 2: turn the pairs (medium, 20 minutes)
#
# `x` has the shape `[tokens, dim]`, `angles` the shape `[tokens, dim / 2]`, in radians. Turn the pairs (x0, x1), (x2, x3),
# … of each token by its angles. Do not change `x` itself.


# %% tags=["exercise"]
def rotate_pairs(x, angles):
    """The pairs of neighbours, turned."""
    raise NotImplementedError


# %%
check("rotate_pairs", rotate_pairs)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `x[:, 0::2]` are the first numbers of all pairs, `x[:, 1::2]` the second ones.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The matrix in *The idea* has a row for each of the two new numbers.
#
# </details>
# <details><summary>Hint 3</summary>
#
# `torch.stack([first, second], dim=-1)` puts the two numbers of each pair side by side; `.flatten(1)` makes one row of
# them.
#
# </details>


# %% tags=["solution"]
def rotate_pairs(x, angles):
    """The pairs of neighbours, turned."""
    first, second = x[:, 0::2], x[:, 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(1)


# %% [markdown]
# ### Exercise 3: three axes (medium, 15 minutes)
#
# Give the angle of every pair of a head, for every token: `[tokens, head_dim / 2]`. `ids` has the shape `[tokens, 3]` and
# holds float64 numbers, `axes_dim` says how many channels each axis has, such as (4, 14, 14).


# %% tags=["exercise"]
def head_angles(ids, axes_dim, theta):
    """The angle of every pair for every token."""
    raise NotImplementedError


# %%
check("head_angles", head_angles)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# One axis alone: the angle is the token's number on this axis times the frequency of the pair.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.outer(ids[:, axis], frequencies)` multiplies all by all.
#
# </details>
# <details><summary>Hint 3</summary>
#
# Each axis has its own frequencies, from its own `dim`. Put the three results side by side with `torch.cat(..., dim=1)`.
#
# </details>


# %% tags=["solution"]
def head_angles(ids, axes_dim, theta):
    """The angle of every pair for every token."""
    angles = []
    for axis, dim in enumerate(axes_dim):
        frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(torch.outer(ids[:, axis], frequencies))
    return torch.cat(angles, dim=1)


# %% [markdown]
# ## Recap
#
# 1. RoPE turns pairs of channels of every query and key by position × frequency. Values are not turned, and lengths stay.
# 2. Turned so, a score depends on the difference of two positions only.
# 3. Every head has three axes, (unused, row, column) with 16 + 56 + 56 = 128 channels, in the miniature 4 + 14 + 14 = 32. Each
#    has its own ladder of frequencies, from 1 radian down to almost 0.
# 4. Text sits at (0, 0, 0): it is never turned, its order comes from T5, and it anchors the picture's places.
# 5. Angles are computed in float64, because their error grows with the position.
#
# **Next**: the table goes into every block (lesson 06). Before that, lesson 05 picks up what the network is told about the
# whole picture: the noise level `[1]`, the guidance scale `[1]` and CLIP's pooled vector `[1, 64]` (FLUX.1-dev: `[1, 768]`).
