# %% [markdown]
# # 03 · Latents and packing: a picture becomes a sequence of tokens
#
# After this lesson you can
#
# - say what the 16 channels of the latents are, and look at them in two ways;
# - pack latents into tokens and unpack them, and say which number of which token is which latent;
# - number the tokens by row and column, and recognise a wrong order by the picture that it gives.
#
# **Time**: half a minute to run, 50 minutes to study. **You need**: lesson 00.

# %%
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

import flux_lab
from flux_lab import instruments
from flux_lab.instruments import (
    FLUX_1_DEV,
    Table,
    explore,
    latent_rgb_factors,
    latents_as_rgb,
    plots,
    show,
    source,
)
from flux_lab.latents import pack_latents, prepare_latent_image_ids, prepare_noise, unpack_latents

torch.set_grad_enabled(False)  # nothing is trained here
pipe = flux_lab.load_mini()
pipe.set_progress_bar_config(disable=True)
mini = instruments.anatomy_of(pipe)  # its sizes

# %% [markdown]
# ## You are here
#
# Two boxes are lit. On the left, noise of shape `[1, 16, 16, 16]` becomes tokens of shape `[1, 64, 64]`. At the bottom,
# the finished tokens become latents again, for the decoder. In FLUX.1-dev it is `[1, 16, 128, 128]` and
# `[1, 4096, 64]`.

# %%
show(
    plots.pipeline_map("latents_and_packing", shapes=(mini, FLUX_1_DEV)),
    alt="Map of the pipeline. Lit: the box where noise is packed into tokens, and the box where"
    " tokens are unpacked.",
)

# %% [markdown]
# ## The idea
#
# A transformer works on a sequence of **tokens**: vectors of one length. A picture is not a sequence. Two steps make
# one of it.
#
# 1. **Encode.** The encoder of the VAE (variational autoencoder, lesson 11) turns the picture into **latents**: 16
#    numbers for each square of 8 × 8 pixels. All first numbers form a map, channel 0, all second numbers channel 1, and
#    so on.
# 2. **Pack.** The latents are cut into **patches** of 2 × 2. The 16 · 2 · 2 = 64 numbers of a patch are written in one
#    line. This is a token.
#
# Packing computes nothing. It gives every number a new place:
#
# $$\text{token}_{\,r C + c}\,[\,4k + 2i + j\,] \;=\; z[\,k,\; 2r + i,\; 2c + j\,]$$
#
# $z$ are the latents, of shape `[16, height, width]`; $k$ is the channel, $r$ and $c$ are row and column of the patch,
# $C$ is the number of patches in a row, and $i$ and $j$, each 0 or 1, are row and column inside the patch.
#
# ### A picture
#
# We take a picture of the miniature's world and render it with the package's own ray tracer, as its training pictures
# were.

# %%
from flux_lab.training.scenes import Scene, SceneObject, render, sample_scene

objects = (
    SceneObject("sphere", "red", "large", "shiny", x=-1.1, y=0.2),
    SceneObject("cube", "blue", "small", "matte", x=1.3, y=-0.4, turn=0.5),
)
picture = Image.fromarray(render([Scene(objects, floor="wooden", relation="left of")])[0])
show(
    plots.gallery([picture], [f"{picture.width} × {picture.height} pixels"]),
    alt="The rendered scene: a large shiny red sphere to the left of a small blue cube on a wooden"
    " floor.",
)

# %% [markdown]
# ### From pixels to latents
#
# The encoder gives a normal distribution for every latent: a mean and a variance. We take the mean. Then the pipeline
# shifts and scales all latents by two fixed numbers. They are chosen so that latents of many pictures have the mean 0
# and the standard deviation 1, as the noise has.


# %% tags=["nbval-check-output"]
def encoded(images):
    """Pictures as the latents that the transformer works on."""
    means = pipe.vae.encode(pipe.image_processor.preprocess(images)).mode()
    return (means - mini.vae.shift_factor) * mini.vae.scaling_factor


def beside(name, tensor):
    assert tuple(tensor.shape) == mini.shapes()[name]
    print(
        f"{name:8} miniature {list(tensor.shape)!s:18} FLUX.1-dev {list(FLUX_1_DEV.shapes()[name])}"
    )


latents = encoded(picture)
beside("image", pipe.image_processor.preprocess(picture))
beside("latents", latents)

# %%
show(
    plots.latent_channels(latents),
    alt="The 16 channels of the scene's latents, each a map of 16 by 16 numbers, on one scale of"
    " colours.",
)

# %% [markdown]
# *What to see*: the same scene sixteen times, 16 × 16 numbers each. Look for the outlines of sphere and cube and for
# the horizon. No channel was told to be "red" or "brightness": the encoder was free to mix them as it liked.
#
# Are mean and standard deviation what was promised? We take 16 random scenes. The two constants of FLUX.1-dev are
# beside those of the miniature.

# %%
rng = np.random.default_rng(0)
pictures = [Image.fromarray(each) for each in render([sample_scene(rng) for _ in range(16)])]
many = encoded(pictures)
for anatomy in (mini, FLUX_1_DEV):
    print(
        f"{anatomy.name:10} shift {anatomy.vae.shift_factor:7.4f}, scale"
        f" {anatomy.vae.scaling_factor:.4f}"
    )
print(f"latents of 16 scenes: mean {many.mean():.2f}, standard deviation {many.std():.2f}")

# %% [markdown]
# ### Latents as colours
#
# Sixteen maps are hard to read. For a quick look we make a colour from the 16 numbers at each place, with 16 × 3
# factors and 3 offsets fitted to pictures that we know. This is a linear map, not the decoder.

# %%
colours = pipe.image_processor.preprocess(pictures) / 2 + 0.5  # from -1 ... 1 to 0 ... 1
fitted = latent_rgb_factors(many, colours)
print(
    "factors",
    list(fitted.factors.shape),
    f"- the map misses {fitted.unexplained:.1%} of the colours' variance",
)


def as_image(tensor):
    return pipe.image_processor.postprocess(2 * tensor - 1)[0]


def decoded(latents):
    means = latents / mini.vae.scaling_factor + mini.vae.shift_factor
    return pipe.image_processor.postprocess(pipe.vae.decode(means))[0]


# %%
small = F.interpolate(
    pipe.image_processor.preprocess(picture) / 2 + 0.5, scale_factor=1 / 8, mode="area"
)
quick = latents_as_rgb(latents, fitted)
show(
    plots.gallery(
        [picture, as_image(small), as_image(quick), decoded(latents)],
        ["the picture", "averaged over 8 × 8 pixels", "latents as colours", "latents, decoded"],
    ),
    alt="The scene four times: the picture, its averages over 8 by 8 pixels, the latents as"
    " colours, the decoded latents.",
)

# %% [markdown]
# *What to see*: second and third picture have the same 16 × 16 places. Where they agree, the latents say the mean
# colour of their place in a linear way. The decoder (right) gets edges out of the same numbers: so they hold more than
# a mean colour.
#
# ### From latents to tokens
#
# Move the slider `token` from 0 to 63 to see the picture taken apart and put together again.

# %% tags=["nbval-check-output"]
tokens = pack_latents(latents)
beside("latents", latents)
beside("tokens", tokens)


# %%
def walk(token=27, channel=0):
    return plots.packing(latents, token, channel)


explore(
    walk,
    token=(0, 63),
    channel=(0, 15),
    alt="Token 27: its patch in a channel, the patch in all 16 channels, the channel rebuilt from"
    " tokens 0 to 27,"
    " and the token's 64 numbers in a line.",
)

# %% [markdown]
# *What to see*: left, the blue frame is the patch. Middle, the same 2 × 2 places in all 16 channels. Below, these 64
# numbers in the order of the token: four of channel 0, four of channel 1, … Right, a channel put together from the
# tokens so far: it fills row by row, from left to right.
#
# The formula, for one number:

# %% tags=["nbval-check-output"]
r, c, C = 3, 5, 8  # row and column of the patch, patches in a row
k, i, j = 7, 1, 0  # channel, row and column inside the patch
token, place = r * C + c, 4 * k + 2 * i + j
print(f"latent [{k}, {2 * r + i}, {2 * c + j}] is number {place} of token {token}")
assert tokens[0, token, place] == latents[0, k, 2 * r + i, 2 * c + j]
assert torch.equal(unpack_latents(tokens, height=128, width=128), latents)
print("unpack(pack(latents)) is equal to the latents, to the last bit")

# %% [markdown]
# Why pack at all? In attention every token looks at every token. Four times fewer tokens are 16 times fewer pairs. Both
# columns of pairs count the picture's tokens only:

# %% tags=["nbval-check-output"]
rows = []
for anatomy in (mini, FLUX_1_DEV):
    _, channels, height, width = anatomy.shapes()["latents"]
    places = height * width
    assert places == 4 * anatomy.tokens
    rows.append([anatomy.name, places, places**2, anatomy.tokens, anatomy.tokens**2])
print(Table(["", "latent places", "pairs", "tokens", "pairs of tokens"], rows))

# %% [markdown]
# ### A number for every place
#
# In a sequence nothing tells that token 8 lies below token 0. So every token gets a **position id** of three numbers:
# (0, row, column). The first is not used by FLUX.1. Lesson 04 shows how the network reads them. The picture is now 96
# pixels high and 128 wide, so that rows and columns cannot be confused.

# %% tags=["nbval-check-output"]
ids = prepare_latent_image_ids(rows=6, columns=8)
print(list(ids.shape), "- tokens 0, 1, 2:", ids[:3].tolist(), "- tokens 8, 9:", ids[8:10].tolist())

# %%
show(
    plots.id_maps(ids, rows=6, columns=8),
    alt="Four maps of 6 by 8 patches: the token's number, growing row by row; ids column 0, all"
    " zero;"
    " ids column 1, the row; ids column 2, the column.",
)

# %% [markdown]
# *What to see*: left, the orange line is the way through the tokens, row by row. Then the three numbers of the ids:
# always 0, the row, the column. Patches are counted, not latents and not pixels.
#
# ### Where the latents come from
#
# To draw from text there is no picture to encode. The latents start as noise of the same shape, drawn from the standard
# normal distribution. It is drawn in the shape of latents, and packed afterwards. With a list of generators, one for
# each image, an image does not depend on the others of its batch:


# %% tags=["nbval-check-output"]
def seeded(seed):
    return torch.Generator().manual_seed(seed)


noise = prepare_noise(mini.shapes()["latents"], seeded(5))
_, *shape = mini.shapes()["latents"]
batch = prepare_noise((3, *shape), [seeded(4), seeded(5), seeded(6)])
assert torch.equal(batch[1:2], noise)
beside("tokens", pack_latents(noise))

# %% [markdown]
# ## The real code
#
# `rearrange` is a function of the library einops. It reads a pattern: on the left the axes as they are, on the right as
# they shall be. A bracket on the left splits an axis, a bracket on the right joins axes. The last name in a bracket
# changes fastest.

# %%
source(pack_latents, docstring=False)

# %%
source(unpack_latents, docstring=False)

# %% [markdown]
# Read the two patterns beside each other: one is the other from right to left. Only `unpack_latents` needs the size of
# the picture, because 48 tokens may be 6 × 8 or 8 × 6. As in the reference it is given in pixels.
#
# The same without einops: split two axes, permute six, join three. In both forms the order *channel, patch row, patch
# column* stands at the end.

# %% tags=["nbval-check-output"]
batch, channels, height, width = latents.shape
split = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
permuted = split.permute(0, 2, 4, 1, 3, 5)  # batch, row, column, channel, patch row, patch column
by_hand = permuted.reshape(batch, height // 2 * (width // 2), channels * 4)
assert torch.equal(by_hand, tokens)
print(list(split.shape), "->", list(permuted.shape), "->", list(by_hand.shape))

# %% [markdown]
# And the ids: a grid of row and column numbers, and zeros.

# %%
source(prepare_latent_image_ids, docstring=False)

# %% [markdown]
# ## Shapes
#
# Sizes of pictures and what becomes of them. FLUX.1-dev and the miniature have the same factors, 8 and 2, and the same
# 16 channels. So the table holds for both.

# %% tags=["nbval-check-output"]
rows = []
for height, width in ((128, 128), (96, 128), (1024, 1024), (768, 1360), (2048, 2048)):
    empty = torch.empty(1, 16, height // 8, width // 8, device="meta")
    packed = pack_latents(empty)
    number = prepare_latent_image_ids(height // 16, width // 16)
    assert packed.shape == (1, height * width // 256, 64)
    assert len(number) == packed.shape[1]
    rows.append(
        [f"{height} × {width}", *(str(list(each.shape)) for each in (empty, packed, number))]
    )
print(Table(["pixels", "latents", "tokens", "ids"], rows))

# %% [markdown]
# Three things that do not fit: latents without the axis of the batch, a height that cannot be cut into patches, and a
# number of tokens that does not belong to the picture.

# %% tags=["nbval-check-output"]
for wrong in (
    lambda: pack_latents(latents[0]),
    lambda: pack_latents(latents[:, :, :15]),
    lambda: unpack_latents(tokens, height=96, width=128),
):
    try:
        wrong()
    except ValueError as error:
        print(f"{type(error).__name__}: {error}")

# %% [markdown]
# ## Trust, then verify
#
# The reference is `diffusers`. We compare the encoder with the same weights, packing, unpacking, and the ids.

# %%
import diffusers

upstream = diffusers.FluxPipeline
reference = diffusers.AutoencoderKL.from_pretrained(
    flux_lab.data_dir() / "flux-mini" / "vae", dtype=torch.float32
)
pixels = pipe.image_processor.preprocess(picture)
theirs = reference.encode(pixels).latent_dist
ours = pipe.vae.encode(pixels)
difference = max((ours.mean - theirs.mean).abs().max(), (ours.std - theirs.std).abs().max())
print(
    f"encoder: largest difference {difference:.1e}, of latents up to {theirs.mean.abs().max():.1f}"
)
assert difference < 1e-4

# %% tags=["nbval-check-output"]
wide = torch.randn(2, 16, 12, 16, generator=seeded(0))
packed = upstream._pack_latents(wide, 2, 16, 12, 16)
pairs = {
    "pack": (pack_latents(wide), packed),
    "unpack": (
        unpack_latents(packed, 96, 128),
        upstream._unpack_latents(packed, 96, 128, vae_scale_factor=8),
    ),
    "ids": (ids, upstream._prepare_latent_image_ids(1, 6, 8, "cpu", torch.float32)),
}
for name, (ours, theirs) in pairs.items():
    print(f"{name:6} largest difference {(ours - theirs).abs().max().item()}")
    assert torch.equal(ours, theirs)

# %% [markdown]
# Here 0.0 is exact: nothing is computed, so nothing is rounded.
#
# ## Turn the knob
#
# What does one channel do? Add a number to all latents of a channel, and decode. The latents have a standard deviation
# of about 1, so 3 is a strong push.


# %%
def push(channel=0, strength=3.0):
    pushed = latents.clone()
    pushed[:, channel] += strength
    return plots.gallery(
        [decoded(latents), decoded(pushed)], ["as it was", f"channel {channel} {strength:+.1f}"]
    )


explore(
    push,
    channel=(0, 15),
    strength=(-4.0, 4.0, 0.5),
    alt="The scene decoded twice: as it was, and with 3 added to all latents of channel 0.",
)

# %% [markdown]
# *What to see*: try several channels with both signs. Some pushes tint the whole picture, some change light and dark,
# some bring out a texture. The decoder needs all channels together.
#
# ## Break it
#
# Order is everything here. We pack the same latents in five wrong orders and unpack them in the right one. Each wrong
# order is a mistake that people make:
#
# | name | mistake |
# |---|---|
# | (row, column, channel) | the order inside a token is wrong: all channels of the upper left latent come first |
# | (channel, column, row) | each patch is read column by column |
# | tokens by columns | the tokens themselves come column by column |
# | quarters | `(p_row rows)` in place of `(rows p_row)`: a token takes one latent from each quarter |
# | reshape only | `latents.reshape(...)`: the shape is right, no number has moved |
#
# **Predict first.** In which pictures are the colours right and the places wrong, in which are the colours wrong too?
# In which can you still recognise the scene?

# %%
RIGHT = "batch channels (rows p_row) (columns p_column) -> batch (rows columns) (channels p_row p_column)"
PATTERNS = {
    "right": RIGHT,
    "(row, column, channel)": RIGHT.replace(
        "(channels p_row p_column)", "(p_row p_column channels)"
    ),
    "(channel, column, row)": RIGHT.replace(
        "(channels p_row p_column)", "(channels p_column p_row)"
    ),
    "tokens by columns": RIGHT.replace("(rows columns)", "(columns rows)"),
    "quarters": RIGHT.replace("(rows p_row) (columns p_column)", "(p_row rows) (p_column columns)"),
}


def packed_as(name, latents):
    if name == "reshape only":
        batch, channels, height, width = latents.shape
        return latents.reshape(batch, height * width // 4, channels * 4)
    return rearrange(latents, PATTERNS[name], p_row=2, p_column=2)


NAMES = [*PATTERNS, "reshape only"]

# %% [markdown]
# First the order inside a token. We pack not latents but their places, and read off where each place has gone.

# %%
everything = [(k, i, j) for k in range(16) for i in range(2) for j in range(2)]
numbers = torch.arange(64.0).reshape(1, 16, 2, 2)  # one patch
inside = {
    name: [everything[int(number)] for number in packed_as(name, numbers).flatten()]
    for name in ("right", "(row, column, channel)", "(channel, column, row)")
}
show(
    plots.token_orders(inside),
    alt="The first 32 numbers of a token in three orders. Right: four of channel 0, four of channel"
    " 1 and so on."
    " (row, column, channel): the upper left of channels 0 to 15, then the upper right."
    " (channel, column, row): like the right one with two colours exchanged.",
)

# %% [markdown]
# *What to see*: the colour is the place in the patch, the number the channel. In the upper strip the colours change
# from number to number, in the middle one they stay for 16 numbers. In the lower one the second and the third of each
# four have changed places.
#
# Now count: how many of the 3072 latents of a picture of 96 × 128 pixels come back to their place?

# %% tags=["nbval-check-output"]
places = torch.arange(16 * 12 * 16.0).reshape(1, 16, 12, 16)
for name in NAMES:
    back = unpack_latents(packed_as(name, places), height=96, width=128)
    print(f"{name:23} {(back == places).sum():4} of {places.numel()} latents at their place")

# %%
wide = encoded(picture.crop((0, 24, 128, 120)))  # 96 pixels high
scrambled = [decoded(unpack_latents(packed_as(name, wide), height=96, width=128)) for name in NAMES]
for part in (NAMES[:3], NAMES[3:]):
    pictures_of_part = [scrambled[NAMES.index(name)] for name in part]
    alt = "The scene, decoded from latents packed in these orders: " + ", ".join(part)
    show(plots.gallery(pictures_of_part, part), alt=alt)

# %% [markdown]
# *What to see*: where only tokens change places ("tokens by columns"), each block of 16 × 16 pixels is whole and the
# blocks are shuffled. (channel, column, row) exchanges two corners of each patch: the scene can still be recognised,
# but its shapes break up. In (row, column, channel) numbers land in other channels, so the colours are lost too.
#
# ### A wrong order on both sides
#
# Now we pack *and* unpack in the same wrong order. **Predict**: what comes back? And is a wrong order harmless then?

# %%
wrong = "(row, column, channel)"


def unpacked_as(name, tokens):
    """The inverse of `packed_as`, for a picture of 6 × 8 patches."""
    before, after = PATTERNS[name].split(" -> ")
    return rearrange(tokens, f"{after} -> {before}", rows=6, columns=8, p_row=2, p_column=2)


assert torch.equal(unpacked_as(wrong, packed_as(wrong, wide)), wide)
print("wrong there and wrong back: equal to the latents, to the last bit")

# %% [markdown]
# A round trip proves that nothing is lost. It does not prove that the order is right. The transformer was trained with
# one order, and draws in that order:

# %%
PROMPT = "a large shiny red sphere to the left of a small blue cube on a wooden floor"
drawn = pipe(PROMPT, height=96, width=128, generator=seeded(0), output_type="latent").images
images = [
    decoded(unpack_latents(drawn, height=96, width=128)),
    decoded(unpacked_as(wrong, drawn)),
    decoded(unpack_latents(drawn, height=128, width=96)),
]
show(
    plots.gallery(
        images, ["as trained", "unpacked (row, column, channel)", "height and width swapped"]
    ),
    alt="One drawing of the miniature, unpacked in three ways: right, in a wrong order, with height"
    " and width swapped.",
)

# %% [markdown]
# *What to see*: three pictures from the same tokens. The right-hand one has swapped height and width: 48 tokens fit
# 8 × 6 as well as 6 × 8, so there is no error. Every row of eight tokens is broken after six, and goes on in the next
# line. A square picture would not show this mistake at all: test with sizes that differ.
#
# ## Common misreadings
#
# **"The three columns of the image ids are red, green and blue."** In the code an array of shape `[height, width, 3]`
# is filled, as for a small colour image. But it never sees a picture:

# %% tags=["nbval-check-output"]
for anatomy in (mini, FLUX_1_DEV):
    side = int(anatomy.tokens**0.5)
    ids = prepare_latent_image_ids(rows=side, columns=side)
    axes = anatomy.transformer.axes_dims_rope
    print(
        f"{anatomy.name}: an image of {anatomy.vae.sample_size} × {anatomy.vae.sample_size} pixels"
    )
    for axis, (name, dim) in enumerate(zip(("unused", "row", "column"), axes, strict=True)):
        lowest, highest = ids[:, axis].aminmax()
        print(
            f"    ids[:, {axis}] {name:7} {lowest:.0f} to {highest:2.0f}, for {dim} channels of"
            " each attention head"
        )

# %% [markdown]
# The function takes two numbers, rows and columns. Every picture of one size has the same ids. The first column is
# always zero, and the others count as far as the picture has patches. Each column belongs to a share of every attention
# head (lesson 04). The heads are as wide as the shares together: 4 + 14 + 14 = 32 and 16 + 56 + 56 = 128.
#
# **"Packing makes the data smaller."** The encoder does that. Packing keeps every number:

# %% tags=["nbval-check-output"]
for anatomy in (mini, FLUX_1_DEV):
    sizes = [torch.Size(anatomy.shapes()[name]).numel() for name in ("image", "latents", "tokens")]
    print(
        f"{anatomy.name:10} image {sizes[0]:9,}, latents {sizes[1]:7,}, tokens {sizes[2]:7,}"
        " numbers"
    )
    assert sizes[0] == 12 * sizes[1]
    assert sizes[1] == sizes[2]

# %% [markdown]
# **"A latent knows only its own 8 × 8 pixels."** Half true. We paint the upper left 8 × 8 pixels black and look how far
# the latents change.

# %%
painted = picture.copy()
painted.paste((0, 0, 0), (0, 0, 8, 8))
change = (encoded(painted) - latents).abs().amax(dim=1)[0]
print(f"{(change > 1e-4).sum()} of {change.numel()} places change by more than 0.0001")
print(
    f"largest change: in the corner itself {change[0, 0]:.3f}, in the opposite corner"
    f" {change[-1, -1]:.5f}"
)

# %% [markdown]
# Most of what a latent says is about its own pixels. But convolutions look at neighbours, and the norms and one
# attention layer of the encoder look at the whole picture (lesson 11).
#
# **"Text-to-image begins with an encoded picture."** It begins with noise. Count how often the encoder is called:

# %% tags=["nbval-check-output"]
calls = {"encoder": 0, "decoder": 0}


def count(name):
    def hook(*_):
        calls[name] += 1

    return hook


hooks = [getattr(pipe.vae, name).register_forward_hook(count(name)) for name in calls]
pipe("a red sphere", num_inference_steps=1, generator=seeded(0))
for hook in hooks:
    hook.remove()
print(calls)
assert calls == {"encoder": 0, "decoder": 1}

# %% [markdown]
# ## Your turn
#
# ### Exercise 1: which token? (easy, 5 minutes)
#
# Somebody points at a pixel, at row `y` and column `x`, both counted from 0. In which token does it lie? `width` is the
# width of the image in pixels, a multiple of 16.


# %% tags=["exercise"]
def token_of_pixel(y, x, width):
    """The number of the token that holds the pixel, counted from 0."""
    raise NotImplementedError


# %%
from flux_lab.exercises import check

check("token_of_pixel", token_of_pixel)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A token covers 16 × 16 pixels. In which row of tokens does the pixel lie, in which column?
#
# </details>
# <details><summary>Hint 2</summary>
#
# How many tokens are in one row? So many come before the second row begins.
#
# </details>
# <details><summary>Hint 3</summary>
#
# In an image of 128 pixels width, the pixel at row 40 and column 100 lies in row 2, column 6: token 2 · 8 + 6 = 22.
#
# </details>


# %% tags=["solution"]
def token_of_pixel(y, x, width):
    """The number of the token that holds the pixel, counted from 0."""
    return (y // 16) * (width // 16) + x // 16


# %% [markdown]
# ### Exercise 2: pack (medium, 15 minutes)
#
# Write the packing yourself, with `rearrange` or with `reshape` and `permute`. Latents `[batch, channels, height,
# width]` become tokens `[batch, height/2 · width/2, channels · 4]`. The number of channels need not be 16.


# %% tags=["exercise"]
def my_pack(latents):
    """Latents as tokens."""
    raise NotImplementedError


# %%
check("pack_latents", my_pack)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Give each of the two last axes another shape: height becomes rows × 2, width becomes columns × 2. Now there are six
# axes.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Put the six axes in the order: batch, row, column, channel, row in the patch, column in the patch.
#
# </details>
# <details><summary>Hint 3</summary>
#
# Join row and column to the axis of the tokens, and the last three to the numbers of a token.
#
# </details>


# %% tags=["solution"]
def my_pack(latents):
    """Latents as tokens."""
    batch, channels, height, width = latents.shape
    split = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // 2 * (width // 2), channels * 4)


# %% [markdown]
# ### Exercise 3: unpack (medium, 15 minutes)
#
# The way back. `height` and `width` are the sides of the *image*, in pixels; latents are 8 times smaller.


# %% tags=["exercise"]
def my_unpack(tokens, height, width):
    """Tokens as latents of shape [batch, channels, height / 8, width / 8]."""
    raise NotImplementedError


# %%
check("unpack_latents", my_unpack)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Read the pattern of packing from right to left.
#
# </details>
# <details><summary>Hint 2</summary>
#
# A reshape can split an axis only if it knows the sizes: height // 16 rows and width // 16 columns of tokens, and
# channels × 2 × 2 numbers in each.
#
# </details>
# <details><summary>Hint 3</summary>
#
# After the split the axes are batch, row, column, channel, row in the patch, column in the patch. In the result the
# channel comes second, and each row stands beside the row in the patch.
#
# </details>


# %% tags=["solution"]
def my_unpack(tokens, height, width):
    """Tokens as latents of shape [batch, channels, height / 8, width / 8]."""
    return rearrange(
        tokens,
        "batch (rows columns) (channels p_row p_column) -> batch channels (rows p_row) (columns"
        " p_column)",
        rows=height // 16,
        columns=width // 16,
        p_row=2,
        p_column=2,
    )


# %% [markdown]
# ### Exercise 4: number the tokens (easy, 10 minutes)
#
# Make the position ids of an image of `height` × `width` pixels: a float32 tensor `[tokens, 3]`, in each row (0, row,
# column) of a token, in the order of the tokens.


# %% tags=["exercise"]
def my_ids(height, width):
    """The position ids of the image tokens."""
    raise NotImplementedError


# %%
check("image_ids", my_ids)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# How many rows and columns of tokens are there? A token is 16 pixels high and wide.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Two loops will do: the outer one over the rows, the inner one over the columns.
#
# </details>
# <details><summary>Hint 3</summary>
#
# `torch.tensor` of a list of whole numbers is int64. Ask for `dtype=torch.float32`.
#
# </details>


# %% tags=["solution"]
def my_ids(height, width):
    """The position ids of the image tokens."""
    places = [(0, row, column) for row in range(height // 16) for column in range(width // 16)]
    return torch.tensor(places, dtype=torch.float32)


# %% [markdown]
# ## Recap
#
# 1. The VAE's encoder makes 16 maps of a picture, 8 times smaller along each side; they are shifted and scaled to mean 0
#    and standard deviation 1.
# 2. A patch of 2 × 2 latents becomes a token of 64 numbers, in the order (channel, patch row, patch column).
# 3. Tokens are numbered row by row, and each has the position id (0, row, column). These are counts, not colours.
# 4. Packing computes nothing and loses nothing. Any order survives a round trip, but the network knows one only.
# 5. Test with sides that differ: a square hides swapped height and width.
#
# **Next**: lesson 04 picks up the ids, a tensor of shape `[64, 3]` (FLUX.1-dev: `[4096, 3]`), and turns them into
# rotations of queries and keys.
