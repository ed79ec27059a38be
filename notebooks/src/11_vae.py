# %% [markdown]
# # 11 · The VAE: pictures to latents and back
#
# After this lesson you can
#
# - follow a picture through encoder and decoder, layer by layer, with every shape, in the miniature and in FLUX.1-dev;
# - say what `scaling_factor` and `shift_factor` are for, measure both, and undo them in the right order;
# - tell what the autoencoder loses, and decode a picture that is too large for the memory in tiles without seams.
#
# **Time**: half a minute to run, 60 minutes to study. **You need**: lesson 00, and to know what a convolution is.

# %%
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import flux_lab
from flux_lab import instruments
from flux_lab.instruments import FLUX_1_DEV, explore, plots, show, source, trace
from flux_lab.training.scenes import Scene, SceneObject, render, sample_scene

torch.set_grad_enabled(False)  # nothing is trained here
pipe = flux_lab.load_mini()
pipe.set_progress_bar_config(disable=True)
mini = instruments.anatomy_of(pipe)  # its sizes
vae = pipe.vae

# %% [markdown]
# ## You are here
#
# At the end of the pipeline. The loop has turned noise into latents; the **decoder** turns latents into pixels. Its
# other half, the **encoder**, is not on the map: drawing from a text never runs it. It made the latents that the
# transformer was trained on.

# %%
show(
    plots.pipeline_map("vae", shapes=(mini, FLUX_1_DEV)),
    alt="Map of the pipeline with the VAE decoder lit: latents of shape [1, 16, 16, 16] go in, an"
    " image of shape"
    " [1, 3, 128, 128] comes out; in FLUX.1-dev [1, 16, 128, 128] and [1, 3, 1024, 1024].",
)

# %% [markdown]
# ## The idea
#
# An **autoencoder** is trained to give back what it is given, through a narrow place. The narrow place here has 16
# numbers, called **channels**, for every 8 × 8 pixels. A network that works on these **latents** has far fewer numbers
# to move:

# %% tags=["nbval-check-output"]
for anatomy in (mini, FLUX_1_DEV):
    image, latents = anatomy.shapes()["image"], anatomy.shapes()["latents"]
    pixels, numbers = np.prod(image), np.prod(latents)
    print(
        f"{anatomy.name:10} image {list(image)!s:18} latents {list(latents)!s:18}"
        f" {pixels // numbers} times fewer numbers"
    )

# %% [markdown]
# *Variational* means that the encoder does not answer with one number, but with a bell curve for each: a mean $\mu$ and
# a standard deviation $s$. The latents are drawn from it, with noise $n$ from a standard normal distribution:
#
# $$z = \mu(x) + s(x) \cdot n.$$
#
# Here $x$ is the image, `[batch, 3, height, width]`, with values from −1 to 1; $\mu$, $s$, $n$ and $z$ are `[batch, 16,
# height/8, width/8]`. Last, the latents are brought to the size that the transformer expects:
#
# $$x_0 = (z - \text{shift}) \cdot \text{scale}.$$
#
# Let us draw true pictures of the miniature's world, with the ray tracer that made its training pictures, and send them
# through and back.

# %%
rng = np.random.default_rng(11)
scenes = [sample_scene(rng) for _ in range(40)]
pictures = [Image.fromarray(array) for array in render(scenes)]
x = pipe.image_processor.preprocess(pictures)
posterior = vae.encode(x)
back = vae.decode(posterior.mode()[:5])

# %%
restored = pipe.image_processor.postprocess(back)
error = [
    plots.difference(first, second, times=4)
    for first, second in zip(pictures[:5], restored, strict=True)
]
show(
    plots.small_grid(
        {"rendered": pictures[:5], "encoded and\ndecoded": restored, "difference,\n4 times": error}
    ),
    alt="Five rendered scenes, the same after encoder and decoder, and the difference, four times"
    " as strong.",
)

# %% [markdown]
# *What to see*: the second row is nearly the first. The third row shows what was lost: look where it lights up, in flat
# areas or along edges. How much is lost is measured in **decibels** (dB), as *peak signal-to-noise ratio*: the largest
# possible value, squared, over the mean squared error, as ten times a logarithm to base 10. 20 dB means an error of
# 1/10 of the range of values, 40 dB of 1/100.


# %%
def psnr(image, other):
    """Decibels, for images in [-1, 1]: the range is 2, so the peak is 4 when squared."""
    return (10 * torch.log10(4 / (image - other).square().mean())).item()


each = [psnr(image, other) for image, other in zip(x[:5], back.clamp(-1, 1), strict=True)]
print("PSNR of the five in dB:", [round(value, 1) for value in each])

# %% [markdown]
# ### The encoder, layer by layer
#
# `trace` records what every part hands on. FLUX.1-dev's VAE runs on PyTorch's `meta` device, where tensors have shapes
# and no numbers.

# %%
with trace(vae) as walk:
    vae.decode(vae.encode(x[:1]).mode())
giant = instruments.on_meta("vae", FLUX_1_DEV)
with trace(giant) as giant_walk:
    giant.decode(giant.encode(torch.empty(1, 3, 1024, 1024, device="meta")).mode())


def shapes_of(*names):
    return instruments.side_by_side(
        walk, giant_walk, only=names, names=(mini.name, FLUX_1_DEV.name)
    )


# %% tags=["nbval-check-output"]
levels = (
    "*/resnets/?",
    "*/?*samplers/0",
    "*/attentions/0",
    "*/conv_in",
    "*/conv_norm_out",
    "*/conv_out",
)
print(shapes_of(*(name.replace("*", "encoder*", 1) for name in levels)))

# %% [markdown]
# Read it from the top. `conv_in` makes 16 channels of three colours (128 in FLUX.1-dev). Then four **levels**,
# `down_blocks`. Each has two **ResNet blocks**: normalise, SiLU ($x \cdot \text{sigmoid}(x)$), 3 × 3 convolution,
# twice, and the result is added to what came in. The first three levels end with a **downsampler**, a convolution that
# moves two pixels at a time, so height and width are halved. `mid_block` has one attention between two ResNet blocks.
# `conv_out` gives 32 channels: 16 means and 16 logarithms of variances.
#
# The normalisation is a **GroupNorm**: the channels form groups, 8 here and 32 in FLUX.1-dev, and each group is given
# mean 0 and deviation 1, over all its channels and the *whole picture*; then each channel is scaled and shifted by two
# learned numbers. Remember the whole picture; tiles will need it.

# %%
seen = {f"level {level}": walk[f"encoder/down_blocks/{level}/resnets/1"] for level in range(4)}
show(
    plots.feature_maps(seen | {"mid block": walk["encoder/mid_block"]}),
    alt="Five rows of five gray maps: what the encoder's levels hold for one scene. The maps get"
    " coarser from row to row.",
)

# %% [markdown]
# *What to see*: for each level the five channels that vary most. At level 0 every pixel has its own numbers; edges
# and surfaces of the scene can be made out. Down to level 3 one number stands for twice as many pixels along each
# side from row to row. In the last two rows it stands for 8 × 8 pixels. Is there a channel that still looks like the
# picture, and one that answers to something without a name?
#
# ### The decoder, layer by layer

# %% tags=["nbval-check-output"]
print(shapes_of(*(name.replace("*", "decoder*", 1) for name in levels)))

# %% [markdown]
# The mirror image, with one ResNet block more at every level. An **upsampler** repeats every number into a 2 × 2 square
# and smooths with a convolution. Mind the last level, `up_blocks/3`: it is *given* 32 channels (FLUX.1-dev: 256) at
# full size, and its first ResNet block halves them.

# %%
seen = {"latents": posterior.mode()[:1]}
seen |= {f"level {level}": walk[f"decoder/up_blocks/{level}/resnets/2"] for level in range(4)}
show(
    plots.feature_maps(seen),
    alt="Five rows of five gray maps: the latents and the four levels of the decoder, from coarse"
    " to fine.",
)

# %% [markdown]
# *What to see*: the way back, from blocks of 8 × 8 pixels to single ones. How many numbers does each stage hand on?

# %%
stages = ["conv_in", "mid_block", *(f"up_blocks/{level}" for level in range(4)), "conv_out"]
walks = {mini.name: walk, FLUX_1_DEV.name: giant_walk}
counts = {
    name: {stage: each[f"decoder/{stage}"].numel() for stage in stages}
    for name, each in walks.items()
}
show(
    plots.level_sizes(counts),
    alt="Numbers handed on by each stage of the decoder, logarithmic, miniature and FLUX.1-dev:"
    " both rise by a factor of 16 or more"
    " up to the third level and fall at the end.",
)
largest = max(counts[FLUX_1_DEV.name].values())
parameters = sum(parameter.numel() for parameter in giant.decoder.parameters())
print(f"FLUX.1-dev's largest tensor: {largest:,} numbers, {largest * 2 / 2**20:.0f} MiB in 16 bits")
print(f"its decoder's parameters: {parameters:,}, {parameters * 2 / 2**20:.0f} MiB in 16 bits")

# %% [markdown]
# *What to see*: the peak is `up_blocks/2`, just after its upsampler: full size with twice the channels of the last
# level. In FLUX.1-dev this one tensor needs more memory than all the decoder's parameters. That is what tiling, below,
# is for.
#
# ### The one attention
#
# Convolutions see their neighbours. The attention in the middle lets every place look at every other: 16 × 16 = 256
# places, one head of 64 channels (FLUX.1-dev: 128 × 128 = 16,384 places, 512 channels). Its scores are
# $\text{softmax}(q k^\top / \sqrt{64})$: for each place a row of 256 weights, which sum to 1.

# %%
attention = "encoder/mid_block/attentions/0"
query, key = walk[f"{attention}/to_q"][0], walk[f"{attention}/to_k"][0]
weights = (query @ key.T / query.shape[1] ** 0.5).softmax(dim=1).unflatten(1, (16, 16))
places = [(2, 2), (8, 8), (13, 13)]
maps = {f"from row {row}, column {column}": weights[16 * row + column] for row, column in places}
assert torch.allclose(weights.sum(dim=(1, 2)), torch.ones(256))
show(
    plots.heat_maps(maps, "share of the attention"),
    alt="Three maps of 16 by 16 places: where the encoder's attention looks from the upper left,"
    " the middle and the lower right.",
)

# %% [markdown]
# *What to see*: if a map is flat, that place takes the average of the picture; if it has spots, it looks for something.
# Compare the bright places with the first scene above.
#
# ### What one place of the latents decides
#
# It is tempting to think that each place of the latents is a block of 8 × 8 pixels. We change the 16 numbers at row 8,
# column 8 and nothing else, and look which pixels change.


# %%
def influence(row, column, strength=2.0):
    """Mean absolute change of every pixel when one place of the latents moves."""
    moved = posterior.mode()[:1].clone()
    moved[:, :, row, column] += strength * posterior.mean.std()
    return (vae.decode(moved) - back[:1]).abs().mean(dim=(0, 1))


change = influence(8, 8)
own = change[64:72, 64:72].sum() / change.sum()
near = change[40:96, 40:96].sum() / change.sum()
print(f"of all change {own:.0%} lies in its own 8 x 8 pixels, {near:.0%} in the 56 x 56 around")
print(f"pixels that change at all: {(change > 0).float().mean():.0%}")

# %%
largest_change = change.max()
faint = (10 * change / largest_change).clamp(max=1)
show(
    plots.heat_maps(
        {"change": change / largest_change, "ten times brighter": faint},
        "share of the largest change",
    ),
    alt="Maps of the pixels that change with one place of the latents: a bright spot several times"
    " wider than 8 pixels; in the second map,"
    " ten times brighter, faint changes reach further.",
)

# %% [markdown]
# *What to see*: on the left the spot is wider than 8 pixels, because neighbouring places share the work. On the right
# the same, ten times brighter. Every pixel changes a little: through the attention, and through GroupNorm, which
# divides by the deviation of the whole picture.
#
# ### The posterior
#
# The distribution that the encoder answers with is called the **posterior**. It is a diagonal Gaussian: one bell curve
# for each of the 4,096 numbers, independent of one another. The encoder gives $\log s^2$, the *logvar*, because a
# logarithm may be any number, while a variance must be positive. It is clamped to −30 … 20.

# %% tags=["nbval-check-output"]
for name in ("mean", "logvar", "std"):
    print(f"{name:6} {list(getattr(posterior, name).shape)}")
assert torch.equal(posterior.std, (0.5 * posterior.logvar).exp())
assert torch.equal(posterior.mode(), posterior.mean)  # the most likely latents

# %%
show(
    plots.posterior_spread(posterior),
    alt="For each of 16 channels two deviations on a logarithmic scale: that of the means from"
    " place to place lies far above that of the"
    " posterior at one place.",
)
signal, noise = posterior.mean.std(), posterior.std.mean()
print(
    f"means vary by {signal:.3f}, the posterior is {noise:.4f} wide: {signal / noise:.0f} times"
    " less"
)

# %% [markdown]
# *What to see*: the lower dots are the noise in $z = \mu + s\,n$, the upper ones what the noise has to compete with.
# The encoder has learned to make the noise small. How strong may the noise get before it can be seen?


# %%
def drawn_at(width=1.0, scene=0):
    mean, std = posterior.mean[scene : scene + 1], posterior.std[scene : scene + 1]
    n = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    image = vae.decode(mean + width * std * n)
    title = f"μ + {width:g} s n: {psnr(x[scene], image[0].clamp(-1, 1)):.1f} dB"
    both = [pictures[scene], pipe.image_processor.postprocess(image)[0]]
    return plots.small_grid({"": both}, ["rendered", title], cell=1.92)


# %%
explore(
    drawn_at,
    width=(0.0, 100.0, 1.0),
    scene=(0, 39),
    alt="A rendered scene beside what is decoded from a sample of its posterior.",
)

# %% [markdown]
# *What to see*: at width 0 this is the mode, at width 1 a proper sample. Can you tell them apart? Move the slider up
# until the picture dissolves.
#
# What keeps $s$ from becoming 0? In training, a second term joins the error of reconstruction: the **KL divergence**,
# which says how far a posterior is from the standard normal distribution. In *nats* (natural logarithms), summed over a
# picture:
#
# $$\text{KL} = \tfrac12 \sum \left(\mu^2 + s^2 - 1 - \log s^2\right).$$
#
# It is 0 where $\mu = 0$ and $s = 1$. In the loss it has a very small weight, printed below. So this is *nearly* a
# plain autoencoder, and its latents are by no means standard normal.

# %%
from flux_lab.training.vae import KL_WEIGHT

by_hand = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).sum(dim=(1, 2, 3))
normal = torch.distributions.Normal
theirs = torch.distributions.kl_divergence(
    normal(posterior.mean, posterior.std), normal(0.0, 1.0)
).sum(dim=(1, 2, 3))
assert torch.allclose(posterior.kl(), by_hand)
assert torch.allclose(by_hand, theirs, rtol=1e-3)
print(
    f"KL of the first scene: {posterior.kl()[0]:.0f} nats,"
    f" {posterior.kl()[0] / posterior.mean[0].numel():.1f} for each number"
)
print(f"its weight in the miniature's training: {KL_WEIGHT:f}")

# %% [markdown]
# ### Scaling and shift, and why
#
# The transformer's training mixes latents with noise, $x_\sigma = (1 - \sigma)\, x_0 + \sigma\, n$, and the noise has
# mean 0 and standard deviation 1. "σ = 0.5" means half and half only if $x_0$ is as strong as the noise. So the latents
# are shifted and scaled to mean 0 and deviation 1. Nothing more is behind the two numbers: they are measured.

# %%
shift, scale = vae.config.shift_factor, vae.config.scaling_factor
z = posterior.mode()
x0 = (z - shift) * scale
print(f"latents as encoded   mean {z.mean():6.3f}, deviation {z.std():.3f}")
print(f"shifted and scaled   mean {x0.mean():6.3f}, deviation {x0.std():.3f}")
print(
    f"the configuration    shift_factor {shift}, scaling_factor {scale}; 1 / {scale} ="
    f" {1 / scale:.3f}"
)
assert abs(x0.std() - 1) < 0.1
assert abs(x0.mean()) < 0.25

# %%
show(
    plots.histograms({"as encoded": z, "shifted and scaled": x0}, "value of a latent"),
    alt="Histograms of the latents of 40 scenes, as encoded and after shift and scale, with the"
    " standard normal curve.",
)

# %% [markdown]
# *What to see*: one curve has the width of the dashed one, the noise. The shape need not be a bell: shift and scale
# only move and stretch. They are two numbers for all 16 channels, measured on 20,000 training pictures; forty
# others give nearly the same. On the way to the pixels, they are undone in the opposite order: divide first, then add
# the shift.

# %% tags=["nbval-check-output"]
real = FLUX_1_DEV.vae
print(
    f"FLUX.1-dev: scaling_factor {real.scaling_factor} = 1 / {1 / real.scaling_factor:.2f},"
    f" shift_factor {real.shift_factor}"
)
assert torch.allclose(x0 / scale + shift, z, atol=1e-5)

# %% [markdown]
# ### Unpack
#
# The loop works on tokens: 2 × 2 places with 16 channels each make a token of 64 numbers (lesson 03). Before the
# decoder they are taken apart again, exactly:

# %% tags=["nbval-check-output"]
tokens = flux_lab.latents.pack_latents(x0[:1])
unpacked = flux_lab.latents.unpack_latents(tokens, height=128, width=128)
assert torch.equal(unpacked, x0[:1])
print(f"miniature  tokens {list(tokens.shape)!s:14} unpacked {list(unpacked.shape)}")
print(
    f"FLUX.1-dev tokens {list(FLUX_1_DEV.shapes()['tokens'])!s:14} unpacked"
    f" {list(FLUX_1_DEV.shapes()['latents'])}"
)

# %% [markdown]
# ### The image processor: rules in front of and behind the VAE
#
# **In**: PIL images, arrays and tensors become a tensor `[batch, 3, height, width]` with values from −1 to 1. PIL
# images hold bytes, 0 … 255. Arrays have the colours last, tensors have them in front, and both hold numbers from 0 to
# 1.

# %% tags=["nbval-check-output"]
processor = pipe.image_processor
array = np.float32(pictures[0]) / 255
tensor = torch.from_numpy(array).permute(2, 0, 1)
three = [processor.preprocess(image) for image in (pictures[0], array, tensor)]
assert torch.equal(three[0], three[1])
assert torch.equal(three[0], three[2])
print("all three:", list(three[0].shape))
for width, height in ((1024, 1024), (1000, 750), (130, 100), (16, 31)):
    result = processor.preprocess(Image.new("RGB", (width, height)))
    print(f"{width:5} x {height:<5} becomes {result.shape[3]:5} x {result.shape[2]}")

# %% [markdown]
# Sizes are **floored** to multiples of 16: 8 for the VAE, times 2 for the patches. The picture is resized, not cut, so
# its proportions change a little. PIL images are resized with the LANCZOS filter, which averages; arrays and tensors
# take the nearest pixel. The same picture, halved in both ways:

# %%
both = [
    processor.preprocess(image, height=64, width=64)
    for image in (pictures[1], np.float32(pictures[1]) / 255)
]
halves = [processor.postprocess(each)[0] for each in both]
show(
    plots.small_grid({"": halves}, ["from PIL: LANCZOS", "from an array: nearest"], cell=1.92),
    alt="One scene halved in size in two ways: with smooth edges from a PIL image, with jagged"
    " edges from an array.",
)

# %% [markdown]
# *What to see*: smooth edges on the left, stairs on the right. If a result looks rougher than it should, see what you
# have given.
#
# The range is guessed. If any number is negative, the picture is taken to be in [−1, 1] already. So a picture that *is*
# in [−1, 1] and happens to have no dark pixel is moved a second time:

# %% tags=["nbval-check-output"]
bright = torch.full((1, 3, 16, 16), 0.5)  # meant as light gray in [-1, 1]
print("0.5 everywhere          becomes", processor.preprocess(bright)[0, 0, 0, 0].item())
bright[0, 0, 5, 5] = -0.1
print("with one negative pixel stays  ", processor.preprocess(bright)[0, 0, 0, 0].item())

# %% [markdown]
# **Out**: $x / 2 + 0.5$, clamped to 0 … 1, times 255, rounded. A half goes to the even neighbour, as in all of numpy.
# Does a byte survive the way in and out? And if we cut off the fraction, as `astype(uint8)` does?

# %% tags=["nbval-check-output"]
print("halves:", np.array([0.5, 1.5, 2.5, 3.5]).round())
every = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
inside = processor.preprocess(every)
assert np.array_equal(processor.postprocess(inside)[0], every)
cut = ((inside * 0.5 + 0.5) * 255).to(torch.uint8)[0, 0].numpy()
print("bytes changed: rounded 0, cut off", (cut != np.asarray(every)[..., 0]).sum(), "of 256")

# %% [markdown]
# ### Where reconstruction fails
#
# 16 numbers for 64 pixels of three colours cannot hold everything. The autoencoder keeps what its training pictures
# were made of. We give it two scenes of its world, one with large and one with small objects, and three strangers:
# text, a landscape with a gradient and film grain, and a checkerboard of single pixels, which looks gray here.


# %%
def ours(size, shapes, x, y):
    left = SceneObject(shapes[0], "red", size, "matte", -x, y)
    return Scene((left, SceneObject(shapes[1], "yellow", size, "matte", x, y)), "gray", "left of")


def landscape():
    row, column = np.mgrid[0:128, 0:128] / 127
    sky = np.stack([0.9 - 0.5 * row, 0.6 + 0.1 * row, 0.5 + 0.4 * row])
    sun = np.exp(-60 * ((row - 0.3) ** 2 + (column - 0.7) ** 2))
    hills = row > 0.65 + 0.08 * np.sin(9 * column) + 0.03 * np.sin(31 * column)
    image = np.where(hills, 0.3 * sky[::-1], sky + 0.4 * sun)
    grain = np.random.default_rng(0).normal(0, 0.04, (1, 128, 128))
    return Image.fromarray(np.uint8(255 * np.clip(image + grain, 0, 1)).transpose(1, 2, 0))


# %%
from PIL import ImageDraw

text = Image.new("RGB", (128, 128), "white")
for line in range(9):
    ImageDraw.Draw(text).text((4, 2 + 14 * line), "Black quartz, judge", fill="black")
board = Image.fromarray(np.uint8(255 * (np.indices((128, 128)).sum(axis=0) % 2))).convert("RGB")
two = [ours("large", ("sphere", "cube"), 1.3, -0.4), ours("small", ("cone", "cylinder"), 1.2, 0.8)]
large, small = (Image.fromarray(array) for array in render(two))
given = {
    "large": large,
    "small": small,
    "text": text,
    "landscape": landscape(),
    "checkerboard": board,
}

# %%
strange = processor.preprocess(list(given.values()))
returned = vae(strange).clamp(-1, 1)
titles = [
    f"{name}\n{psnr(a, b):.1f} dB" for name, a, b in zip(given, strange, returned, strict=True)
]
rows = {"given": list(given.values()), "encoded and\ndecoded": processor.postprocess(returned)}
show(
    plots.small_grid(rows, titles, cell=1.15),
    alt="Five pictures before and after the autoencoder: two scenes of its world, text, a landscape"
    " and a checkerboard.",
)

# %% [markdown]
# *What to see*: which of the five can you still read? For the three strangers the decibels are not a fault of the idea,
# but of the training: the miniature's autoencoder has seen nothing but table tops. FLUX.1-dev's was trained on a much
# larger world, with the same 16 numbers for 8 × 8 pixels; small letters and far faces are where it fails first.
#
# One number for a whole picture hides what happens to its objects: most pixels are floor and sky, and easy. So we count
# again, only the pixels that the objects cover:

# %%
from flux_lab.training.quality import object_masks

masks = torch.from_numpy(object_masks(two, 128))
for name, mask, a, b in zip(("large", "small"), masks, strange[:2], returned[:2], strict=True):
    inside = psnr(a[:, mask], b[:, mask])
    print(
        f"{name} objects: {psnr(a, b):.1f} dB in all pixels, {inside:.1f} dB in the"
        f" {int(mask.sum()):,} of the objects"
    )

# %% [markdown]
# The same in every single pixel, as an absolute error; the values of a pixel go from −1 to 1:

# %%
losses = (back.clamp(-1, 1) - x[:5]).abs().mean(dim=1)
show(
    plots.heat_maps({f"scene {place}": losses[place] for place in (0, 1)}, "absolute error"),
    alt="Absolute error of every pixel for two scenes: dark in flat areas, bright where the picture"
    " changes quickly.",
)
gray = x[:5].mean(dim=1)
steep = F.max_pool2d(gray, 3, 1, 1) + F.max_pool2d(
    -gray, 3, 1, 1
)  # largest minus smallest of 3 x 3 pixels
edge = steep > steep.flatten().quantile(0.9)
print(
    f"mean error: {losses[edge].mean():.3f} in the steepest tenth of the pixels,"
    f" {losses[~edge].mean():.3f} in the others"
)

# %% [markdown]
# *What to see*: where the picture changes from one pixel to the next there is more to remember, and the error is
# larger. How fine may a pattern be? We draw gray stripes and measure how much of their contrast comes back.


# %%
def stripes(width, contrast=0.2):
    signs = torch.where(torch.arange(128) // width % 2 == 0, 1.0, -1.0)
    return contrast * signs.expand(1, 3, 128, 128)


widths = [1, 2, 4, 8, 16, 32]
kept = []
for width in widths:
    wanted = stripes(width)
    # How much of the pattern is in the result: its projection onto the pattern.
    kept.append(((vae(wanted) * wanted).mean() / wanted.square().mean()).item())
show(
    plots.contrast_kept(widths, {"vertical gray stripes": kept}),
    alt="Share of the contrast of stripes that comes back, against the width of a stripe from 1 to"
    " 32 pixels.",
)

# %% [markdown]
# *What to see*: a curve at 1 would mean that everything comes back. Find the width below which stripes are lost. They
# are not of the miniature's world either, so even wide ones may come back too weak or too strong.
#
# ### Tiling
#
# The decoder's memory grows with the area of the picture, and the work of its attention with the square of the area. So
# a large picture is decoded in **tiles**. Our scene with 256 × 256 pixels, four times what the miniature was trained
# for:

# %%
wide = processor.preprocess(Image.fromarray(render(scenes[:1], size=256)[0]))
z_wide = vae.encode(wide).mode()  # [1, 16, 32, 32]
whole = vae.decode(z_wide)
quarters = [
    [vae.decode(z_wide[:, :, row : row + 16, column : column + 16]) for column in (0, 16)]
    for row in (0, 16)
]
cut_apart = torch.cat([torch.cat(row, dim=3) for row in quarters], dim=2)
vae.enable_tiling()
blended = vae.decode(z_wide)
vae.enable_tiling(False)
results = {"whole": whole, "4 tiles, cut": cut_apart, "tiles, blended": blended}
show(
    plots.small_grid(
        {"": [processor.postprocess(each)[0] for each in results.values()]}, list(results), cell=2.0
    ),
    alt="A scene of 256 by 256 pixels decoded in three ways: whole, in four tiles put side by side,"
    " in overlapping tiles that are blended.",
)

# %% [markdown]
# *What to see*: in the middle picture look for a cross through the middle. There each tile ends without knowing its
# neighbour, and GroupNorm has taken its mean and deviation over one quarter only, so the quarters may differ in tint.
# On the right, a tile begins every 12 places, overlaps the one before by 4, a quarter of its 16, and fades in over it.
# The last tiles, at the right and at the bottom, are only 8 places wide, so they know least of the picture: look there
# too.

# %%
show(
    plots.seam_profile(results, seam=128),
    alt="Difference of neighbouring columns of pixels around column 128: a sharp peak at the seam"
    " for cut tiles, none for the other two.",
)

# %% [markdown]
# *What to see*: a seam is a jump between two columns. Cut tiles have it, blended ones do not. Peaks that all three
# curves have are edges in the picture itself. Blended tiles are still not the whole picture:

# %%
for name in ("4 tiles, cut", "tiles, blended"):
    jump = plots.neighbour_steps(results[name])[127] / plots.neighbour_steps(whole)[127]
    far = (results[name] - whole).abs().mean()
    print(
        f"{name:15} jump at the seam {jump:4.1f} times that of the whole, mean difference to the"
        f" whole {far:.4f}"
    )

# %% [markdown]
# The blending hides the borders; the tiles' own means and deviations stay. Look at the lowest quarter of the picture: the
# last row of tiles is what is left over, 8 rows of latents with hardly anything but floor in them. Group norm brings its
# small differences to the usual size, so it can show patterns that the whole picture does not have.
#
# For FLUX.1-dev a tile is 1024 × 1024 pixels, so tiling does nothing until a picture is larger. What does a picture of
# 2048 × 2048 need then?

# %% tags=["nbval-check-output"]
for side in (1024, 2048):
    with trace(giant, only="decoder/*") as big:
        giant.decode(torch.empty(1, 16, side // 8, side // 8, device="meta"))
    name, most = max(((name, big[name].numel()) for name in big), key=lambda item: item[1])
    print(
        f"{side} x {side}: largest tensor {list(big[name].shape)}, {2 * most / 2**30:.1f} GiB in 16"
        f" bits, in {name.split('/resnets')[0]}"
    )

# %% [markdown]
# With tiles the decoder never works on more than the first line says, for any size. A whole *batch* can be decoded
# picture by picture with `vae.enable_slicing()`; that changes nothing in the result.
#
# ## The real code
#
# The decoder, all of it. The loops over levels are in the constructor, so `forward` reads like the table above.

# %%
source(flux_lab.autoencoder.Decoder, docstring=False)

# %% [markdown]
# A ResNet block and the two ways to change the size. The downsampler pads with zeros on the right and at the bottom
# only; you will break that below.

# %%
source(flux_lab.autoencoder.ResnetBlock2D, docstring=False)

# %%
source(flux_lab.autoencoder.Downsample2D, docstring=False)

# %%
source(flux_lab.autoencoder.Upsample2D, docstring=False)

# %%
source(flux_lab.autoencoder.DiagonalGaussianDistribution, docstring=False)

# %% [markdown]
# And how two tiles are blended, line by line:

# %%
source(flux_lab.autoencoder.blend)

# %% [markdown]
# ## Shapes
#
# The whole way in and out, both models:

# %% tags=["nbval-check-output"]
for anatomy, model, device in ((mini, vae, "cpu"), (FLUX_1_DEV, giant, "meta")):
    image = torch.zeros(anatomy.shapes()["image"], device=device)
    moments = model.encoder(image)
    decoded = model.decode(model.encode(image).mode())
    assert model.encode(image).mean.shape == anatomy.shapes()["latents"]
    assert decoded.shape == image.shape
    print(
        f"{anatomy.name:10} {list(image.shape)} -> moments {list(moments.shape)} -> latents"
        f" {list(model.encode(image).mean.shape)}"
    )

# %% [markdown]
# Two wrong shapes. Latents that are still packed, and latents of SD 1.5, which have 4 channels:

# %% tags=["nbval-check-output"]
from flux_lab.shapes import ShapeError

for wrong in (tokens, torch.zeros(1, 4, 16, 16)):
    try:
        vae.decode(wrong)
    except ShapeError as error:
        print(error, end="\n\n")

# %% [markdown]
# ## Trust, then verify
#
# The reference reads the same file. We compare means, logarithms of the variances, a sample, the decoded picture, and
# both sides of the image processor.

# %%
import diffusers

diffusers.utils.logging.disable_progress_bar()
reference = diffusers.AutoencoderKL.from_pretrained(
    flux_lab.data_dir() / "flux-mini" / "vae", dtype=torch.float32
)
theirs = reference.encode(x[:4]).latent_dist
seeded = torch.Generator().manual_seed
pairs = {
    "mean": (posterior.mean[:4], theirs.mean),
    "logvar": (posterior.logvar[:4], theirs.logvar),
    "sample": (vae.encode(x[:4]).sample(seeded(0)), theirs.sample(seeded(0))),
    "image": (back[:4], reference.decode(theirs.mode()).sample),
}
differences = {name: (our - their).abs().max().item() for name, (our, their) in pairs.items()}
print("largest differences:", {name: f"{value:.1e}" for name, value in differences.items()})
assert max(differences.values()) < 1e-4

# %% tags=["nbval-check-output"]
their_processor = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=16)
odd = pictures[0].resize((100, 75))
assert torch.equal(their_processor.preprocess(odd), processor.preprocess(odd))
for our, their in zip(processor.postprocess(back), their_processor.postprocess(back), strict=True):
    assert np.array_equal(our, their)
print("the image processors agree in every value and every byte")

# %% [markdown]
# ## Turn the knob
#
# What does one channel hold? Choose a channel and add to it, everywhere, a number of its own standard deviations. The
# right map shows which pixels change.

# %%
spread = z.std(dim=(0, 2, 3))


def push(channel=0, amount=3.0, scene=0):
    moved = z[scene : scene + 1].clone()
    moved[:, channel] += amount * spread[channel]
    both = processor.postprocess(vae.decode(torch.cat([z[scene : scene + 1], moved])))
    titles = ["as encoded", f"channel {channel}: {amount:+g} deviations", "difference, 4 times"]
    return plots.small_grid({"": [*both, plots.difference(*both, times=4)]}, titles, cell=1.92)


# %%
explore(
    push,
    channel=(0, 15),
    amount=(-4.0, 4.0, 0.5),
    scene=(0, 39),
    alt="A scene, the same with one channel of its latents raised, and the difference.",
)

# %% [markdown]
# *What to see*: is there a channel for one colour, or one for brightness? Mostly tint, brightness and texture move
# together, and differently on floor and objects: nobody told the encoder to keep them apart.
#
# ## Break it
#
# **Predict first**: the decoder is given latents whose scaling was undone in a wrong way. Which mistake does the most
# harm, and which one can hardly be seen?

# %%
ways = {
    "right:\nx0 / scale + shift": x0 / scale + shift,
    "forgotten:\nx0": x0,
    "multiplied:\nx0 * scale + shift": x0 * scale + shift,
    "shift first:\n(x0 + shift) / scale": (x0 + shift) / scale,
    "no shift:\nx0 / scale": x0 / scale,
}
decoded = vae.decode(torch.cat([each[:1] for each in ways.values()]))
for name, image in zip(ways, decoded, strict=True):
    print(
        f"{name.replace(chr(10), ' '):34} {psnr(x[0], image.clamp(-1, 1)):5.1f} dB, deviation of"
        f" the pixels {image.std():.2f}"
    )
show(
    plots.small_grid({"": processor.postprocess(decoded)}, list(ways), cell=1.4),
    alt="One scene decoded after undoing the scaling in five ways, the first of them right.",
)

# %% [markdown]
# *What to see*: no error and no warning: only the picture says it. Where the scale is below 1, as in FLUX.1-dev,
# latents that were not divided are too weak, and multiplying instead makes them weaker still. The shift is small
# against the deviation (FLUX.1-dev: 0.12 against 2.77), so its mistakes are small too, which is why they live long.
#
# **Predict**: the downsampler pads with zeros on the right and at the bottom. What happens if we pad on the left and at
# the top instead? The sizes do not change.


# %%
def pad_the_other_side(module, args, result):
    return F.conv2d(F.pad(args[0], (1, 0, 1, 0)), module.conv.weight, module.conv.bias, stride=2)


samplers = [block.downsamplers[0] for block in vae.encoder.down_blocks if len(block.downsamplers)]
hooks = [each.register_forward_hook(pad_the_other_side) for each in samplers]
moved = vae(x[:4])
for hook in hooks:
    hook.remove()
fit = {s: psnr(moved[:, :, s:, s:], x[:4, :, : 128 - s, : 128 - s]) for s in range(13)}
best = max(fit, key=fit.get)
print(
    f"PSNR in place {fit[0]:.1f} dB; moved by {best} pixels to the right and down it is best:"
    f" {fit[best]:.1f} dB"
)

# %%
broken = processor.postprocess(moved)
show(
    plots.small_grid({"rendered": pictures[:4], "padded on the\nother side": broken}, cell=1.1),
    alt="Four scenes and what comes back when the encoder pads on the left and at the top: the"
    " scene is moved to the lower right.",
)

# %% [markdown]
# *What to see*: the scene has moved. Each downsampler looks one of its own pixels too far to the upper left: 1 pixel at
# the first, 2 at the second, 4 at the third, 1 + 2 + 4 = 7 in all. Apart from its borders the picture looks fine on its
# own, so such a bug is found by comparing numbers, not by looking.
#
# ## Common misreadings
#
# **"Every level of the VAE has attention."** Only the middle block does, once in the encoder and once in the decoder:

# %% tags=["nbval-check-output"]
for name, model in ((mini.name, vae), (FLUX_1_DEV.name, giant)):
    found = [
        path
        for path, module in model.named_modules()
        if isinstance(module, flux_lab.autoencoder.Attention)
    ]
    print(f"{name:10} {found}")
    assert found == ["encoder.mid_block.attentions.0", "decoder.mid_block.attentions.0"]

# %% [markdown]
# **"The last level of FLUX.1-dev's decoder works with 128 channels."** It ends with 128. It *starts* with 256, at full
# size, and its first ResNet block has a 1 × 1 convolution, the *shortcut*, to add 256 channels to 128:

# %% tags=["nbval-check-output"]
for name, model in ((mini.name, vae), (FLUX_1_DEV.name, giant)):
    blocks = model.decoder.up_blocks[3].resnets
    widths = [f"{block.conv1.in_channels} -> {block.conv1.out_channels}" for block in blocks]
    print(
        f"{name:10} {widths}, shortcut of the first: {list(blocks[0].conv_shortcut.weight.shape)}"
    )

# %% [markdown]
# **"0.18215 is a magic number."** It is 1 / 5.49, and 5.49 was the standard deviation of the latents of Stable
# Diffusion 1.5. For FLUX.1-dev it is 0.3611, for the miniature whatever came out. You can measure it, on any pictures
# of the right kind:

# %%
print(f"1 / deviation of 40 scenes: {1 / z.std():.3f}; in the configuration: {scale}")
print(f"mean of 40 scenes: {z.mean():.3f}; in the configuration: {shift}")

# %% [markdown]
# **"Drawing from a text uses the whole autoencoder, noise included."** Count the calls of its parts during one image:

# %% tags=["nbval-check-output"]
calls = {"encoder": 0, "decoder": 0}


def counting(name):
    return lambda *_: calls.update({name: calls[name] + 1})


hooks = [getattr(vae, name).register_forward_hook(counting(name)) for name in calls]
pipe("a red cube", num_inference_steps=2)
for hook in hooks:
    hook.remove()
print("calls for one image from a text:", calls)

# %% [markdown]
# No encoder, so no posterior and no sample: the latents come from the loop. The encoder is needed to train, and to
# start from a given picture.
#
# **"8 times smaller means 8 times fewer numbers."** 8 along each of two sides makes 64; 16 channels in place of 3
# colours take back 16/3. 64 · 3 / 16 = 12, as counted at the beginning. With 4 channels, as in Stable Diffusion 1.5, it
# would be 48: less to move, and more is lost.
#
# ## Your turn
#
# ### Exercise 1: undo the scaling (easy, 5 minutes)
#
# The loop has finished; `latents` are shifted and scaled. Give the latents that the decoder wants.


# %% tags=["exercise"]
def unscale_latents(latents, scaling_factor, shift_factor):
    """The decoder's latents, from those of the transformer."""
    raise NotImplementedError


# %%
from flux_lab.exercises import check

check("unscale_latents", unscale_latents)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The way in was `(z - shift_factor) * scaling_factor`. What was done last is undone first.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Divide, then add.
#
# </details>


# %% tags=["solution"]
def unscale_latents(latents, scaling_factor, shift_factor):
    """The decoder's latents, from those of the transformer."""
    return latents / scaling_factor + shift_factor


# %% [markdown]
# ### Exercise 2: to bytes (easy, 10 minutes)
#
# The decoder gives `images`, numbers from about −1 to 1, a little beyond at times. Give bytes: a tensor of the same
# shape with dtype `torch.uint8`, from 0 to 255, rounded.


# %% tags=["exercise"]
def to_bytes(images):
    """Images in [-1, 1] as bytes."""
    raise NotImplementedError


# %%
check("to_bytes", to_bytes)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# First to the range 0 … 1: halve and add 0.5. Then clamp. Then multiply.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `.to(torch.uint8)` cuts the fraction off. Call `.round()` before it.
#
# </details>


# %% tags=["solution"]
def to_bytes(images):
    """Images in [-1, 1] as bytes."""
    return ((images * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


# %% [markdown]
# ### Exercise 3: the KL divergence (medium, 15 minutes)
#
# `mean` and `logvar` are `[batch, channels, rows, columns]`; `logvar` is the natural logarithm of the variance. Give
# the KL divergence from the standard normal distribution for each picture, in nats: a tensor `[batch]`.


# %% tags=["exercise"]
def kl_divergence(mean, logvar):
    """KL divergence of each picture's posterior from N(0, 1): [batch]."""
    raise NotImplementedError


# %%
check("kl_divergence", kl_divergence)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The formula stands above, under "The posterior". The variance $s^2$ is `logvar.exp()`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Sum over channels, rows and columns, not over the batch: `.sum(dim=(1, 2, 3))`.
#
# </details>


# %% tags=["solution"]
def kl_divergence(mean, logvar):
    """KL divergence of each picture's posterior from N(0, 1): [batch]."""
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))


# %% [markdown]
# ### Exercise 4: join two tiles (medium, 15 minutes)
#
# `left` and `right` are decoded tiles of one shape, `[batch, channels, height, width]`. The last `overlap` columns of
# `left` show the same place as the first `overlap` columns of `right`. Give one picture of `2 * width - overlap`
# columns. In the overlap, column i = 0, 1, … has the share `i / overlap` of `right` and the rest of `left`.


# %% tags=["exercise"]
def join_tiles(left, right, overlap):
    """Two tiles as one picture, faded into one another in the overlap."""
    raise NotImplementedError


# %%
check("join_tiles", join_tiles)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Three parts, joined with `torch.cat(..., dim=-1)`: `left` without its overlap, the overlap, `right` without its
# overlap.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `weight = torch.arange(overlap, dtype=left.dtype) / overlap` has a number for every column of the overlap, and
# multiplies `right[..., :overlap]` as it is: the last axis fits.
#
# </details>


# %% tags=["solution"]
def join_tiles(left, right, overlap):
    """Two tiles as one picture, faded into one another in the overlap."""
    weight = torch.arange(overlap, dtype=left.dtype) / overlap
    faded = left[..., -overlap:] * (1 - weight) + right[..., :overlap] * weight
    return torch.cat([left[..., :-overlap], faded, right[..., overlap:]], dim=-1)


# %% [markdown]
# ## Recap
#
# 1. Four levels, three halvings: 8 × 8 pixels of three colours become 16 numbers, 12 times fewer in all. Attention
#    stands only in the middle.
# 2. The encoder answers with a Gaussian, mean and logvar. Its noise is small, and drawing from a text never uses it.
# 3. `(z - shift) * scale` gives the latents mean 0 and deviation 1, as strong as the noise. The decoder needs `x0 /
#    scale + shift`.
# 4. Sizes are floored to multiples of 16, values go from bytes to [−1, 1] and back by rounding; fine detail and what
#    was not in the training pictures is lost.
# 5. The largest tensor stands at full size in the decoder. Tiles bound it; overlap and blending soften the seams, but
#    a tile that sees little of the picture still comes out different.
#
# **Next**: the image, `[1, 3, 128, 128]` (FLUX.1-dev: `[1, 3, 1024, 1024]`), is finished, and with it the pipeline.
# Lesson 12 goes back one generation and picks up other latents: `[1, 4, 64, 64]`, those of Stable Diffusion 1.5.
