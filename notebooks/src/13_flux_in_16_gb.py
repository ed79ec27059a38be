# %% [markdown]
# # 13 · FLUX.1 in 16 GB: plan, quantize, stage, stream
#
# After this lesson you can
#
# - say what a picture needs in memory, stage by stage, before you download 34 GB;
# - quantize a matrix to 8 and to 4 bits by hand, and measure what that costs in a layer and in the image;
# - run a model that is larger than the memory: in stages, without its modulation weights, or block by block from disk.
#
# **Time**: half a minute to run, 90 minutes to study. **You need**: lessons 00, 05 and 08.

# %%
import copy
import json
from itertools import pairwise

import torch
import torch.nn.functional as F

import flux_lab
from flux_lab import instruments
from flux_lab.inference import hoist, load_staged, offloaded, plan, quantize, rehearse
from flux_lab.instruments import FLUX_1_DEV, Table, explore, plots, show, source

torch.set_grad_enabled(False)  # nothing is trained here
pipe = flux_lab.load_mini()
pipe.set_progress_bar_config(disable=True)
mini = instruments.anatomy_of(pipe)  # its sizes
MINI = flux_lab.data_dir() / "flux-mini"  # its folder
PROMPT = "a large shiny red sphere to the left of a small blue cube on a wooden floor"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## You are here
#
# No new part. All that has weights is lit: the two text encoders, the transformer, the decoder.

# %%
show(
    plots.pipeline_map("flux_in_16_gb", shapes=(mini, FLUX_1_DEV)),
    alt="Map of the pipeline with everything lit that has weights: CLIP encoder, T5 encoder, transformer and VAE decoder.",
)

# %% [markdown]
# ## The idea
#
# A picture is made in three **stages**: *encode* the prompt, *denoise* in the loop, *decode* the latents. A stage needs
# memory for its **weights** and for its **activations**, the tensors that it computes on the way. If a stage's weights
# are freed before the next stage loads its own, the largest stage decides:
#
# $$\text{peak} = \max_{\text{stage}} \big(\text{weights} + \text{activations}\big), \qquad
# \text{weights} = \tfrac18 \cdot \text{parameters} \cdot \text{bits a parameter}.$$
#
# All sizes are in bytes; 1 GB is 10⁹ bytes. So there are four ways to a smaller peak. This lesson takes them one by one:
#
# | | what it makes smaller | what it costs |
# |---|---|---|
# | stages | what is loaded at one time | loading time |
# | quantization | bits a parameter | exactness |
# | hoisting | parameters of the loop | nothing, once the loop has more than one step |
# | streaming | what is loaded at one time, far below one model | reading the file in every step |
#
# ### Plan first
#
# The planner needs no weights. It runs the program on PyTorch's `meta` device, where tensors have sizes and no numbers,
# and counts the bytes that are alive after every operation.

# %%
plan("dev", height=1024, width=1024, bits=16)

# %% [markdown]
# That is FLUX.1-dev at 1024 × 1024 pixels in 16 bits. *Quantizing* is what rounding the largest layer takes for a moment
# while it is loaded; the larger of it and the activations counts. The command `flux-lab plan --model dev --size 1024` prints the
# same. Now with 16, 8 and 4 bits, and beside each the same for the miniature.

# %% tags=["nbval-check-output"]
plans = {(model, bits): plan(model, bits=bits) for model in ("mini", "dev") for bits in (16, 8, 4)}
for (model, bits), made in plans.items():
    worst = max(made.stages, key=lambda stage: stage.peak)
    stages = "  ".join(f"{stage.name} {stage.peak / 1e6:9,.1f}" for stage in made.stages)
    print(f"{model:4} {bits:2} bits, MB: {stages}   {worst.name} is the largest")


# %%
def in_gb(stage):
    return {
        "weights": stage.weights / 1e9,
        "activations or quantizing": (stage.peak - stage.weights) / 1e9,
    }


stages = [(bits, stage) for bits in (16, 8, 4) for stage in plans["dev", bits].stages]
rows = {f"{bits} bits: {stage.name}": in_gb(stage) for bits, stage in stages}
label = "GB (FLUX.1-dev, 1024 x 1024 pixels, hoisted modulation)"
show(
    plots.stacked_bars(rows, xlabel=label, marks={"16 GB": 16}),
    alt="Nine bars, three stages at 16, 8 and 4 bits: weights and what is needed beside them in GB. At 16 bits denoise reaches"
    " beyond the mark of 16 GB, at 8 and 4 bits all stages stay below it.",
)

# %% [markdown]
# *What to see*: in 16 bits one stage alone is above the mark. In 8 bits all three fit. From 8 to 4 bits the weights shrink
# again, but what is needed beside them does not halve, and the decoder, which is not quantized, stays as it is: the fewer
# bits, the more the rest counts.
#
# And if nothing is freed? Then all weights are there at once:

# %% tags=["nbval-check-output"]
as_it_is = {bits: plan("dev", bits=bits, hoisted=False) for bits in (16, 8, 4)}
for bits, made in as_it_is.items():
    weights, activations = zip(
        *((stage.weights, stage.activations) for stage in made.stages), strict=True
    )
    together = (sum(weights) + max(activations)) / 1e9
    print(f"{bits:2} bits: all at once {together:5.1f} GB, in stages {made.peak / 1e9:5.1f} GB")

# %% [markdown]
# ### 8 bits: whole numbers, and a scale for each row
#
# Take one matrix $W$ of the miniature, `[out, in]`. Its numbers are floating point. **Quantizing** writes each of them as a
# whole number from −127 to 127, its **code**, which fits into one byte. All weights of a row share one **scale**, the
# row's largest absolute value, called absmax, kept in 32 bits:
#
# $$q_{ij} = \text{round}\!\left(127\, \frac{w_{ij}}{\text{absmax}_i}\right), \qquad
# w_{ij} \approx q_{ij}\, \frac{\text{absmax}_i}{127}.$$

# %%
W = pipe.transformer.transformer_blocks[3].attn.to_q.weight
absmax = W.abs().amax(dim=1, keepdim=True)
codes = (127 * W / absmax).round().to(torch.int8)
back = codes * absmax / 127
for name, row in {"weights": W[0], "codes": codes[0], "turned back": back[0]}.items():
    print(f"{name:12}", [round(number, 4) for number in row[:6].tolist()])
print(f"absmax of this row: {absmax[0].item():.4f}")
assert ((back - W).abs() <= absmax / 254 * 1.0001).all()  # off by half a step at the most

# %% [markdown]
# Why a scale for each row? A row makes one output channel. If one scale had to do for the whole matrix, the largest weight
# anywhere would set the size of a step for all. And why not one for each weight? Because a scale takes room too.

# %%
shared = {"int8: a row, 1 × 96": (1, 96), "the whole matrix": (96, 96), "blocks of 4 × 16": (4, 16)}
show(
    plots.block_grid(W[:16], shared, "absolute weight"),
    alt="16 rows of the matrix of absolute weights three times, with lines around what shares a scale: rows, nothing, small blocks.",
)


# %%
def relative_error(given, exact):
    return ((given - exact).norm() / exact.norm()).item()


def rounded_to_blocks(matrix, height, width, steps=127):
    """Round a matrix, one scale for each block of height x width."""
    blocks = matrix.unflatten(0, (-1, height)).unflatten(2, (-1, width))
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / steps
    return ((blocks / scale).round() * scale).flatten(2).flatten(0, 1)


for name, (height, width) in shared.items():
    error = relative_error(rounded_to_blocks(W, height, width), W)
    print(f"{name:24} error {error:.4f}, {8 + 32 / (height * width):.2f} bits a weight")

# %% [markdown]
# *What to see*: white lines enclose what shares a scale. A bright spot spoils the steps of its own block only. The smaller
# the block, the smaller the error, and the more the scales cost. Nearly all of FLUX.1's rows have 3,072 weights or more, so
# a scale a row costs 0.01 bits a weight.
#
# ### Tokens have outliers
#
# There are two ways to multiply with such a matrix. **Weight only**: turn $W$ back into floating point, multiply as
# always. **LLM.int8()**: give each token codes and a scale too, multiply whole numbers by whole numbers, which hardware
# does fast, and scale the result.
#
# The second has a difficulty. In large trained models some channels are far larger than all others, in every token. Such
# an **outlier** takes the 127 steps of its token for itself. LLM.int8() finds the channels in which any token reaches 6,
# and multiplies these few columns in floating point. Are there some in the miniature?

# %%
seen = {}
layer = pipe.transformer.single_transformer_blocks[20].proj_out
hook = layer.register_forward_pre_hook(lambda _, given: seen.setdefault("x", given[0][0]))
pipe(PROMPT, num_inference_steps=1, output_type="latent", generator=seeded())
hook.remove()
x = seen["x"]  # [tokens, channels]
show(
    plots.channel_peaks(x.abs().amax(dim=0), 6.0, "largest absolute value\nof any token"),
    alt="A bar for each of the 480 channels that enter the last layer of a single-stream block, and the threshold of 6 as a line.",
)

# %% [markdown]
# *What to see*: 480 channels enter this layer, 96 of the attention and 384 of the MLP. The legend says how many reach
# the threshold. A small model has few or none, and they pass the threshold by a little; outliers that matter were
# found only when models grew. We plant one to see what it does:


# %%
from flux_lab.inference.int8 import linear_int8, quantize_rows

layer_codes = quantize_rows(layer.weight)
others = x.index_fill(1, torch.tensor([200]), 0.0) @ layer.weight.T  # what all other channels say


def error_with_outlier(strength, threshold):
    """Error of the product with channel 200 at `strength`, in units of what the other channels say."""
    large = x.index_fill(1, torch.tensor([200]), strength)
    product = linear_int8(large, *layer_codes, threshold=threshold)
    return ((product - large @ layer.weight.T).norm() / others.norm()).item()


# %%
strengths = [1, 5, 10, 20, 40, 60, 80, 100]
ways = {"all in int8": 1e9, "outliers apart, from 6 on": 6.0}
curves = {
    name: [error_with_outlier(strength, threshold) for strength in strengths]
    for name, threshold in ways.items()
}
show(
    plots.lines(strengths, curves, "value of channel 200", "error / what the others say"),
    alt="Error of a product against the value of one channel: it grows with it when all is in int8, and stays small with outliers apart.",
)

# %% [markdown]
# *What to see*: without the split the other channels are rounded to ever fewer steps as one grows, and ever more of
# what they say is lost. With the split the curve leaves the other once channel 200 passes 6 and rises far more
# slowly: what is left is the rounding of the weights that this one channel is multiplied with.
#
# ### 4 bits: NF4
#
# 4 bits are 16 levels. Where should they lie? Trained weights are close to **normally distributed**: many near zero,
# few far out. Levels that are each used equally often are the *quantiles* of the normal distribution. **NF4** (normal
# float, 4 bits) takes 7 of them below zero, 8 above, and zero itself, scaled to −1 … 1:

# %% tags=["nbval-check-output"]
from statistics import NormalDist

quantile = NormalDist().inv_cdf
# The quantile at 1 is infinite: stay half a level away from it.
outermost = 1 - (1 / 32 + 1 / 30) / 2
above = [quantile(outermost + (0.5 - outermost) * step / 8) for step in range(8)]
below = [-quantile(outermost + (0.5 - outermost) * step / 7) for step in range(7)]
levels = torch.tensor(sorted([*below, 0.0, *above])) / above[0]
print([round(level, 4) for level in levels.tolist()])

# %%
from flux_lab.inference.nf4 import BLOCK, NF4_CODE, dequantize_nf4, quantize_nf4

linears = {
    name: each.weight
    for name, each in pipe.transformer.named_modules()
    if isinstance(each, torch.nn.Linear)
}
blocks = torch.cat([weight.flatten() for weight in linears.values()]).view(-1, BLOCK)[::16]
in_units = (blocks / blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)).flatten()

# %%
books = {
    "int8": [step / 127 for step in range(-127, 128)],
    "4 bits, even": torch.linspace(-1, 1, 16).tolist(),
    "NF4": NF4_CODE,
}
show(
    plots.code_books(in_units, books, "weight, in units of the largest of its block of 64"),
    alt="Histogram of the transformer's weights, scaled block by block, three times, with the levels of int8, of 16 even steps,"
    " and of NF4 below: NF4's levels crowd near zero, where most weights are.",
)

# %% [markdown]
# *What to see*: the gray hill is where the miniature's weights are, in units of their block's scale. Even levels waste
# themselves on the slopes. NF4's are dense where the hill is high. (The thin bars at −1 and 1 are the largest weight of each
# block, which is exact by construction.)

# %%
stairs = {name: books[name] for name in ("4 bits, even", "NF4")}
show(
    plots.rounding_stairs(stairs, "weight / scale", "level"),
    alt="Stairs of 16 levels: even ones, and NF4's with narrow steps near zero and wide ones outside.",
)

# %% [markdown]
# *What to see*: narrow steps in the middle, wide ones outside. Zero is a level of NF4, and not of the even ones: a
# weight of zero stays zero.
#
# ### Blocks, and scales of scales
#
# With 16 levels one large weight does more harm, so a scale is shared by fewer: **blocks** of 64 weights. A 32-bit scale
# for 64 weights costs half a bit a weight. **Double quantization** rounds the scales too: to 8 bits, in blocks of
# 256 scales, after their mean is taken off.

# %% tags=["nbval-check-output"]
double = 8 / 64 + 32 / (64 * 256)
ways = {
    "bf16": 16,
    "int8, rows of 3072": 8 + 32 / 3072,
    "NF4, scales in 32 bits": 4 + 32 / 64,
    "NF4": 4 + double,
}
for name, bits in ways.items():
    print(
        f"{name:24} {bits:6.3f} bits a weight, all of FLUX.1-dev: {11_901_408_320 * bits / 8e9:5.1f} GB"
    )

# %%
small = quantize_nf4(W)
print({name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in small._asdict().items()})


def error_of(size, levels):
    """Error when `size` weights share a scale and are rounded to the nearest of `levels`."""
    numbers = W.flatten().view(-1, size)
    scale = numbers.abs().amax(dim=1, keepdim=True)
    nearest = ((numbers / scale)[..., None] - levels).abs().argmin(dim=-1)
    return relative_error(levels[nearest] * scale, numbers)


# %%
sizes = [16, 32, 64, 128, 256, 512, 1024]
curves = {
    name: [error_of(size, torch.tensor(books[name])) for size in sizes]
    for name in ("4 bits, even", "NF4")
}
show(
    plots.lines(sizes, curves, "weights that share a scale", "relative error of the weights"),
    alt="Relative error of the weights against the block size, for even levels and for NF4: both rise with the block size.",
)
print(
    f"NF4, blocks of 64, double quantization: {relative_error(dequantize_nf4(small, *W.shape), W):.4f}"
)

# %% [markdown]
# *What to see*: both curves rise with the size of the block. The printed number is NF4's at 64, with rounded scales: the
# second rounding hardly shows.
#
# ### The error, layer by layer and in the image
#
# `quantize(model, scheme)` puts `Linear8bit` or `LinearNF4` in the place of every `nn.Linear`. How far off are the
# weights of each block?

# %%
schemes = ("int8", "nf4")
small_models = {scheme: quantize(copy.deepcopy(pipe.transformer), scheme) for scheme in schemes}


def block_of(name):
    """The block, such as "double 07", that a layer's name belongs to; None for the others."""
    kind, _, rest = name.partition("transformer_blocks.")
    return f"{'single' if kind else 'double'} {int(rest.split('.')[0]):02}" if rest else None


def block_errors(model):
    """The mean relative error of the matrices of each block."""
    found = {}
    for name, weight in linears.items():
        if block_of(name) and weight.norm() > 0:
            error = relative_error(model.get_submodule(name).dequantized(), weight)
            found.setdefault(block_of(name), []).append(error)
    return {block: sum(errors) / len(errors) for block, errors in found.items()}


# %%
panels = {
    f"error of the weights, {name}": block_errors(model) for name, model in small_models.items()
}
show(
    plots.block_bars(panels),
    alt="Relative error of the weights of all 57 blocks, in int8 about one percent, in NF4 about nine percent.",
)

# %% [markdown]
# *What to see*: rounding is the same everywhere, so the bars are nearly equal: below 1 % in int8, between 9 and 10 %
# in NF4. Do these errors add up over 57 blocks and many steps, or do they cancel out? Same seed, same words:


# %%
def drawn_by(transformer, steps=5, pipe=pipe):
    other = copy.copy(pipe)
    other.transformer = transformer
    arguments = {"num_inference_steps": steps, "generator": seeded(), "output_type": "pt"}
    with flux_lab.shapes.checks(enabled=False):  # many pictures: without the checks they are faster
        return other(PROMPT, **arguments).images[0].float()


def to_pil(image):
    return pipe.image_processor.postprocess(2 * image[None] - 1)[0]


half = flux_lab.FluxPipeline.from_pretrained(MINI, dtype=torch.bfloat16)
half.set_progress_bar_config(disable=True)
exact = drawn_by(pipe.transformer)
drawn = {"fp32": exact, "all in bf16": drawn_by(half.transformer, pipe=half)}
drawn |= {scheme: drawn_by(model) for scheme, model in small_models.items()}
pictures = {name: to_pil(image) for name, image in drawn.items()}

# %%
apart = [plots.difference(pictures["fp32"], image, times=4) for image in pictures.values()]
both = {"drawn": list(pictures.values()), "difference\nto fp32, × 4": apart}
show(
    plots.image_grid(both, list(pictures)),
    alt="The same prompt and seed drawn in fp32, in bf16, and with weights in int8 and NF4; below each its difference to fp32, times four.",
)
for name, image in drawn.items():
    change = 255 * (image - exact).abs().mean()
    print(f"{name:12} mean difference of a colour value {change:6.2f} of 255")

# %% [markdown]
# *What to see*: which differences can you see without the lower row? Where they are large, look for edges that moved: the
# picture is another one, not a blurred one. Compare int8 with bf16, which nobody hesitates to use: it
# rounds the noise and every activation as well. A small model suffers more
# than a large one, because each of its weights says more.
#
# ### Hoisting: 27 % of the transformer never has to be there
#
# Lesson 05: what the modulation layers say depends on the time, the guidance scale and CLIP's vector. Not on the picture. All
# of it is known before the loop. So compute it for all steps, keep the small table, and drop the weights. Every number is
# computed by the same operation as before, so nothing changes, to the last bit.

# %% tags=["nbval-check-output"]
# What each step will be conditioned on, found by a loop without the network:
known = rehearse(pipe, PROMPT, num_inference_steps=4, generator=seeded())
hoisted = hoist(pipe.transformer, known)
hoisted_image = drawn_by(hoisted, steps=4)
same = torch.equal(hoisted_image, drawn_by(pipe.transformer, steps=4))
print("the same image, to the last bit:", same)
assert same

# %% tags=["nbval-check-output"]
from flux_lab.inference.hoisting import modulation_linears

dev_transformer = instruments.on_meta("transformer", FLUX_1_DEV)
for name, model in {"miniature": pipe.transformer, "FLUX.1-dev": dev_transformer}.items():
    layers = modulation_linears(model).values()
    modulation = sum(p.numel() for each in layers for p in each.parameters())
    whole = sum(p.numel() for p in model.parameters())
    print(f"{name:10} {whole:14,} parameters, {modulation / whole:.1%} in modulation layers")

# %%
fifty = {yes: plan("dev", bits=8, steps=50, hoisted=yes) for yes in (False, True)}
bars = {
    "28 steps, as it is": in_gb(as_it_is[8]["denoise"]),
    "28 steps, hoisted": in_gb(plans["dev", 8]["denoise"]),
    "50 steps, as it is": in_gb(fifty[False]["denoise"]),
    "50 steps, hoisted": in_gb(fifty[True]["denoise"]),
}
show(
    plots.stacked_bars(bars, xlabel="GB (FLUX.1-dev, denoise, 8 bits, 1024 x 1024 pixels)"),
    alt="Four bars: the loop of FLUX.1-dev in 8 bits with 28 and 50 steps, with and without modulation weights; hoisted is a quarter less.",
)

# %% [markdown]
# *What to see*: a quarter less, and more steps add next to nothing: one row of the tables for each.
#
# ### Encode, free, denoise, free, decode
#
# `load_staged` gives a pipeline that is called as always, and loads each model when it is needed. What the stages hand
# on is small: prompt embeddings, pooled embeddings (for true CFG the negative ones too), latents. Here are the live tensor
# bytes while it runs. `LiveBytes` is the planner's own counter, on real tensors this time.

# %%
import time

from flux_lab.inference.live_bytes import LiveBytes

staged = load_staged(MINI, quantize="int8", dtype=torch.float32)
staged.set_progress_bar_config(disable=True)
planned, times = staged.plan(steps=1), [time.perf_counter()]
with LiveBytes(every=4) as live:
    embeds = staged.encode({"": (PROMPT, None)}, planned)
    times.append(time.perf_counter())
    latents = staged.denoise(planned, num_inference_steps=1, generator=seeded(), **embeds)
    times.append(time.perf_counter())
    staged.decode(latents, planned, "pt")
    times.append(time.perf_counter())

# %%
seconds = [each - times[0] for each in times]
history = [(second - times[0], alive) for second, alive in live.history]
spans = dict(zip(("encode", "denoise", "decode"), pairwise(seconds), strict=True))
show(
    plots.bytes_over_time(history, spans, "megabytes of live tensors"),
    alt="Megabytes of live tensors over time, in three stages: weights are loaded, activations come and go, and everything is freed before"
    " the next stage.",
)
print("planned:", {stage.name: f"{stage.peak / 1e6:.1f} MB" for stage in planned.stages})

# %% [markdown]
# *What to see*: each stage climbs while its weights are loaded, one layer quantized after the other, and falls to
# nearly nothing at its end. The teeth on top are activations. Compare the peaks with the plan: tests hold the two to
# within 10 %. In this run, with weights in 8 bits and pictures in float32, the decoder is the largest stage, because
# its picture is large for so small a model.
#
# ### Offload and streaming
#
# What if not even one stage fits? The blocks of a transformer run one after the other. Only the one that computes has to be
# there. **Offloading** keeps all weights in the CPU's memory and brings each block to the GPU when its turn comes.
# **Streaming** brings it from the file. Either way a second thread fetches block $k + 1$ while block $k$ computes. If
# fetching is faster than computing, it costs nothing.

# %%
from flux_lab.inference.loading import open_model
from flux_lab.inference.stream_log import LoggedStreamer

empty, read = open_model(MINI / "transformer", "cpu", torch.float32, known, mapped=False)
streamer = LoggedStreamer(empty, read, "cpu")
with streamer as transformer:
    streamed_image = drawn_by(transformer, steps=4)
assert torch.equal(streamed_image, hoisted_image)
most = max(size for _, size in streamer.resident) / 1e6
whole = sum(parameter.nbytes for parameter in hoisted.parameters()) / 1e6
print(f"at most {most:.2f} MB of blocks were there, of {whole:.1f} MB")

# %% [markdown]
# The same image, bit for bit, with two of 57 blocks in memory. A look at a short stretch of it:

# %%
done = streamer.rows["computing thread"]  # two entries for each block: waiting, computing
begin, end = done[2 * 60][1], done[2 * 84][1]
rows = {
    name: [
        (what, start - begin, stop - begin) for what, start, stop in events if begin <= start < end
    ]
    for name, events in streamer.rows.items()
}
resident = [(second - begin, size) for second, size in streamer.resident if begin <= second < end]
colors = {"reading": "#E69F00", "waiting": "#D55E00", "computing": "#0072B2"}
show(
    plots.threads(rows, colors, resident),
    alt="Two rows of bars over milliseconds: the computing thread is busy with block after block, the reading thread fetches the next one"
    " at the start of each; below, the bytes of streamed weights go up and down and are never more than two blocks'.",
)

# %% [markdown]
# *What to see*: orange bars are reading the next block, blue ones below them computing this one, red ones putting
# a block into place, and waiting for it if it was not there yet. Where a red bar is longer than the usual sliver, reading
# was the slower part. Below, the memory: never more than two blocks.
#
# `streamed(folder, memory_budget)` does this from files, `offloaded(model, device, memory_budget)` from memory:

# %%
with offloaded(copy.deepcopy(pipe.transformer), "cpu", memory_budget="10MB") as transformer:
    assert torch.equal(drawn_by(transformer, steps=4), hoisted_image)
try:
    with offloaded(copy.deepcopy(pipe.transformer), "cpu", memory_budget="1MB"):
        pass
except ValueError as error:
    print(error)

# %% [markdown]
# ### What it costs at full size
#
# The real weights are not part of this course, but their *size* can be had without them: a transformer of 12 billion
# random numbers. `python -m flux_lab.inference.full_size` writes it, makes the system forget the file's pages, and
# runs one step at 256 × 256 pixels with 512 text tokens in a process that the operating system holds to 6 GB. No run can be faster than
# reading the file, or than the matrix products alone. The last column divides by the larger of these two.

# %%
measured = json.loads((flux_lab.data_dir() / "measured" / "full_size.json").read_text())
header = [
    "weights",
    "file GB",
    "peak GB",
    "reading s",
    "products s",
    "one step s",
    "times the larger",
]
rows = []
for run in measured:
    reading, products, seconds = (run[name] for name in ("reading", "products", "seconds"))
    sizes = [round(run["file"] / 1e9, 1), round(run["resident"] / 1e9, 2)]
    times = [round(reading, 1), round(products, 1), round(seconds, 1)]
    rows.append([run["scheme"], *sizes, *times, round(seconds / max(reading, products), 2)])
Table(header, rows)

# %%
for run in measured:
    where = f"{run['machine']}, {run['threads']} threads"
    print(f"{run['scheme']}: {where}; limit of {run['limit']} set by {run['limit_by']}")

# %% [markdown]
# *What to see*: all weights pass through a few GB of memory. The nearer the last column is to 1, the better reading and
# computing go on at the same time. In 8 and 4 bits the file is smaller, but that makes no step faster by itself: tokens
# have to be rounded or codes turned back before there is anything to multiply. Quantization buys memory; it buys time only
# where the hardware multiplies the codes themselves, or where reading was what took so long.
#
# ### The usual program, and ours, line by line
#
# This is what most people run first:
#
# | the usual `diffusers` program | ours |
# |---|---|
# | `pipe = FluxPipeline.from_pretrained(name, torch_dtype=torch.bfloat16)` | `pipe = load_staged(name, quantize="int8",` |
# | `pipe.enable_model_cpu_offload()` | `    memory_budget="16GB", device="cuda")` |
# | `image = pipe(prompt, height=1024, width=1024,` | the same |
# | `    guidance_scale=3.5, num_inference_steps=50, max_sequence_length=512,` | the same; 20 to 28 steps are usual |
# | `    generator=torch.Generator("cpu").manual_seed(0)).images[0]` | the same |
#
# Line by line. *First*: theirs reads 34 GB into the CPU's memory; ours reads configurations, and refuses if the plan is
# above the budget. *Second*: theirs moves one **whole model** at a time to the GPU; the transformer is 23.8 GB, too much
# for a card of 16. Ours frees stage by stage too, but quantizes and hoists on the way; `stream=True` goes block by block.
# *The last*: noise is made on the CPU, so that a seed is the same picture on every card.
#
# And this is the recipe by which FLUX.1-dev came to cards of 16 GB:
#
# | the 8-bit recipe with `diffusers` and `bitsandbytes` | in `load_staged` |
# |---|---|
# | load T5 with `load_in_8bit=True`; CLIP as it is | `quantize="int8"`: T5 and the transformer, no more |
# | a pipeline without transformer and VAE; `encode_prompt` | `encode` |
# | the same for the negative prompt | only if true CFG uses it |
# | `del` the encoders, `gc.collect()`, `torch.cuda.empty_cache()` | a model ends with its stage |
# | load the transformer with `load_in_8bit=True` | layer by layer, and without modulation weights |
# | hand over `prompt_embeds`, `pooled_prompt_embeds` and the negative ones; 20 steps; latents | `denoise` |
# | `del` the transformer, load the VAE, undo scaling and shift, decode | `decode` |
#
# That recipe is reported to take about 8 GB for T5 and 14 GB for the transformer. T5's `wo`, whose results are too large for
# fp16, is kept in 32 bits there. In bf16 it can stay in 16 bits, as it does here. And our transformer is hoisted:

# %% tags=["nbval-check-output"]
recipe = plan("dev", height=1024, width=1024, bits=8, steps=20)
for stage in recipe.stages:
    print(
        f"{stage.name:8} {stage.weights / 1e9:6.2f} GB of weights, peak {stage.peak / 1e9:6.2f} GB"
    )
recipe.check("16GB")  # raises BudgetError, with a suggestion, when it does not fit

# %% [markdown]
# ### One variable to the real model
#
# Put the name of a folder, or `"black-forest-labs/FLUX.1-dev"` after you have accepted its licence, in place of `None`.

# %%
REAL = None

if REAL is None:
    print("no checkpoint named. This is what would happen:")
    for stage in recipe.stages:
        print(
            f"  load {stage.weights / 1e9:5.2f} GB, {stage.name}, peak {stage.peak / 1e9:5.2f} GB, free"
        )
else:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    real = load_staged(REAL, quantize="int8", memory_budget="16GB", device=device)
    show(
        real(PROMPT, num_inference_steps=20, guidance_scale=3.5, generator=seeded()).images[0],
        alt=PROMPT,
    )

# %% [markdown]
# And with a budget that is too small, before a single weight is read:

# %% tags=["nbval-check-output"]
try:
    plans["dev", 16].check("16GB")
except ValueError as error:
    print(error)

# %% [markdown]
# ## The real code
#
# The function that rounds, for any code book. It serves twice: for the weights, and for their scales.

# %%
from flux_lab.inference import nf4

source(nf4.quantize_blocks)

# %%
source(nf4.quantize_nf4)

# %% [markdown]
# The streamer works with hooks from outside; the model knows nothing of it. Before a block computes, its weights are put in,
# and the next blocks are asked for; `result()` waits for the reading thread. After it, they are taken away.

# %%
from flux_lab.inference.streaming import Streamer

source(Streamer._bring)

# %% [markdown]
# ## Shapes
#
# A linear layer of the miniature and the same one of FLUX.1-dev, in all three forms.

# %% tags=["nbval-check-output"]
from flux_lab.inference.int8 import Linear8bit
from flux_lab.inference.nf4 import LinearNF4


def shown_shapes(layer):
    held = {name: tensor for name, tensor in layer.state_dict().items() if name != "bias"}
    return {
        name: f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        for name, tensor in held.items()
    }


for anatomy in (mini, FLUX_1_DEV):
    dim = anatomy.transformer.inner_dim
    with torch.device("meta"):
        forms = (
            torch.nn.Linear(dim, 4 * dim).bfloat16(),
            Linear8bit(dim, 4 * dim),
            LinearNF4(dim, 4 * dim),
        )
    for form in forms:
        print(anatomy.name, type(form).__name__, shown_shapes(form))

# %%
x = torch.randn(2, 5, 96)
projection = small_models["nf4"].transformer_blocks[0].ff.net[0].proj
assert projection(x).shape == (2, 5, 384)
assert forms[2].weight.shape == (12288 * 3072 // 2,)
try:
    projection(torch.randn(2, 5, 64))
except Exception as error:
    print(type(error).__name__, str(error)[:200])

# %% [markdown]
# The error comes from the matrix product, which no longer sees the codes. And `quantize_rows` itself says what it wants:

# %%
try:
    quantize_rows(torch.randn(96))
except flux_lab.shapes.ShapeError as error:
    print(error)

# %% [markdown]
# ## Trust, then verify
#
# First the code book, which we computed from quantiles above, against the published table:

# %% tags=["nbval-check-output"]
difference = (levels - torch.tensor(NF4_CODE)).abs().max().item()
print("NF4's levels, largest difference to the published ones below 2e-7:", difference < 2e-7)
assert difference < 2e-7

# %% [markdown]
# Then the layers. The reference is `diffusers`' transformer. It gets the *rounded* weights in floating point: whatever we
# do with codes and scales, its answer has to be ours.

# %%
import diffusers

diffusers.utils.logging.disable_progress_bar()
reference = diffusers.FluxTransformer2DModel.from_pretrained(
    MINI / "transformer", torch_dtype=torch.float32
)
given = {}
hook = pipe.transformer.register_forward_pre_hook(
    lambda _, args, kwargs: given.update(kwargs), with_kwargs=True
)
pipe(PROMPT, num_inference_steps=1, output_type="latent", generator=seeded())
hook.remove()

# %%
for name, module in small_models["nf4"].named_modules():
    if hasattr(module, "dequantized"):
        reference.get_submodule(name).weight.copy_(module.dequantized())
theirs = reference(**given, return_dict=False)[0]
ours = small_models["nf4"](**given)
print(
    f"NF4, velocity of one step: largest difference {(ours - theirs).abs().max():.1e}, largest number {theirs.abs().max():.2f}"
)
torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

# %% [markdown]
# Last, the stages: without quantization the staged pipeline gives the picture of the plain one.

# %% tags=["nbval-check-output"]
plain_staged = load_staged(MINI, dtype=torch.float32, memory_budget="200MB")
plain_staged.set_progress_bar_config(disable=True)
first = plain_staged(PROMPT, num_inference_steps=4, generator=seeded(), output_type="pt").images[0]
print("staged and hoisted, the same picture to the last bit:", torch.equal(first, hoisted_image))
assert torch.equal(first, hoisted_image)

# %% [markdown]
# The package's tests go further: codes, scales and products equal those of `bitsandbytes` where that is installed.
#
# ## Turn the knob
#
# The planner behind sliders. Find the smallest memory for 1024 pixels. Which stage decides at 2048 pixels? What does `stream`
# leave?


# %%
def planned_bars(pixels=1024, bits="8", hoisted=True, stream=False):
    made = plan("dev", height=pixels, width=pixels, bits=int(bits), hoisted=hoisted, stream=stream)
    rows = {stage.name: in_gb(stage) for stage in made.stages}
    label = f"GB (FLUX.1-dev, {pixels} x {pixels} pixels), peak {made.peak / 1e9:.2f} GB"
    return plots.stacked_bars(rows, xlabel=label, marks={"16 GB": 16})


explore(
    planned_bars,
    pixels=(256, 2048, 256),
    bits=["16", "8", "4"],
    hoisted=bool,
    stream=bool,
    alt="Three bars, encode, denoise and decode, of weights and what is needed beside them in GB, with a mark at 16 GB.",
)

# %% [markdown]
# ## Break it
#
# Three changes to NF4. **Predict first**: which is worst, and which does almost nothing?
#
# 1. The two weights of each byte are read in the wrong order.
# 2. One scale for the whole matrix in place of one for each 64 weights.
# 3. Even levels in place of NF4's.


# %%
def broken(weight, how):
    """A matrix after NF4, with one thing wrong."""
    if how == "even levels":
        return dequantized_with(weight, torch.linspace(-1, 1, 16), 64)
    if how == "one scale":
        return dequantized_with(weight, torch.tensor(NF4_CODE), weight.numel())
    right = dequantize_nf4(quantize_nf4(weight), *weight.shape)
    return right.view(-1, 2).flip(1).view(weight.shape)


def dequantized_with(weight, levels, size):
    indices, absmax = nf4.quantize_blocks(weight.flatten(), levels, size)
    return nf4.dequantize_blocks(indices, absmax, levels, size).view(weight.shape)


# %%
shown = {"fp32": pictures["fp32"], "NF4": pictures["nf4"]}
for how in ("even levels", "one scale", "halves swapped"):
    changed, errors = copy.deepcopy(pipe.transformer), []
    for name, weight in linears.items():
        wrong = broken(weight, how)
        changed.get_submodule(name).weight.copy_(wrong)
        if weight.norm() > 0:
            errors.append(relative_error(wrong, weight))
    shown[f"{how}:\nerror of weights {sum(errors) / len(errors):.2f}"] = to_pil(drawn_by(changed))
show(
    plots.gallery(list(shown.values()), list(shown)),
    alt="Five images: fp32, NF4, NF4 with even levels, NF4 with one scale for each matrix, and NF4 with the halves of each byte swapped.",
)

# %% [markdown]
# *What to see*: swapped halves give every weight its neighbour's value: numbers of the right sizes in the wrong places.
# That is another model, and it draws nothing. A poor code book, or a scale for all, is only less exact: something may
# change, but it is a picture of this world. The model bears noise on its weights.
#
# Second experiment: call the hoisted transformer with a time that it has no table for. **Predict**: a wrong picture, or
# an error?

# %%
try:
    hoisted(**given | {"timestep": torch.tensor([0.123])})
except ValueError as error:
    print(error)

# %% [markdown]
# An error, because a table that quietly answered for another time would be the worst kind of bug: a slightly worse
# picture.
#
# ## Common misreadings
#
# **"Half the bits, half the memory."** For the quantized weights. Activations, CLIP, the VAE and T5's `wo` stay. In all:

# %% tags=["nbval-check-output"]
peaks = {bits: plans["dev", bits].peak / 1e9 for bits in (16, 8, 4)}
print({f"{bits} bits": f"{peak:.2f} GB, {peak / peaks[16]:.0%}" for bits, peak in peaks.items()})

# %% [markdown]
# **"`enable_model_cpu_offload()` makes it fit."** It moves one whole model at a time. The largest model has to fit, with
# its activations:

# %% tags=["nbval-check-output"]
whole_models = as_it_is[16]
print(
    {stage.name: f"{stage.peak / 1e9:.1f} GB" for stage in whole_models.stages},
    "fits into 24 GB:",
    whole_models.peak <= 24e9,
)
print("block by block:", f"{plan('dev', bits=16, stream=True).peak / 1e9:.1f} GB")

# %% [markdown]
# **"NF4 takes 4 bits a weight."** 4.127, with its scales; 4.5 without double quantization. Counted in a layer of
# FLUX.1-dev:

# %% tags=["nbval-check-output"]
bytes_held = sum(tensor.nbytes for name, tensor in forms[2].state_dict().items() if name != "bias")
print(f"{8 * bytes_held / (3072 * 4 * 3072):.3f} bits a weight")

# %% [markdown]
# **"In 4 bits it computes in 4 bits, so it is faster."** There is no product of NF4 numbers. The weights are turned back
# into the dtype of the input, then multiplied:

# %% tags=["nbval-check-output"]
layer4 = small_models["nf4"].transformer_blocks[0].attn.to_q
x = torch.randn(3, 96)
print(
    "same as a product with the weights turned back:",
    torch.equal(layer4(x), F.linear(x, layer4.dequantized(x.dtype), layer4.bias)),
)

# %% [markdown]
# **"LLM.int8() keeps the outlier weights in 16 bits."** All weights are int8. The *tokens* have outliers; these columns of
# the tokens are multiplied in floating point, with weights turned back for the purpose.
#
# **"Quantize everything."** The VAE and CLIP are 1 % of the parameters. Nothing is gained, and the decoder's error goes
# straight into the pixels:

# %% tags=["nbval-check-output"]
try:
    quantize(pipe.vae, "int8")
except ValueError as error:
    print(error)

# %% [markdown]
# ## Your turn
#
# ### Exercise 1: the peak (easy, 5 minutes)
#
# `stages` is a dict: name → (bytes of weights, bytes of activations). The stages run one after the other, each freed before
# the next is loaded. Give the peak, in bytes.


# %% tags=["exercise"]
def staged_peak(stages):
    """Peak bytes of stages that run one after the other."""
    raise NotImplementedError


# %%
from flux_lab.exercises import check

check("staged_peak", staged_peak)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# While a stage computes, its weights *and* its activations are there. Nothing of any other stage is.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `stages.values()` gives the pairs.
#
# </details>


# %% tags=["solution"]
def staged_peak(stages):
    """Peak bytes of stages that run one after the other."""
    return max(weights + activations for weights, activations in stages.values())


# %% [markdown]
# ### Exercise 2: what a matrix takes (medium, 15 minutes)
#
# Bytes of a matrix of `rows` × `columns` weights with all its scales. `scheme` is `"bf16"`, `"int8"` (a 4-byte scale for each
# row) or `"nf4"` (one byte for the scale of each 64 weights; 4 bytes for each 256 of these scales; 4 bytes for the scales'
# mean). A last block that is not full counts as one.


# %% tags=["exercise"]
def linear_bytes(rows, columns, scheme):
    """Bytes of a matrix with its scales, a whole number."""
    raise NotImplementedError


# %%
check("linear_bytes", linear_bytes)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Two bytes, one byte, half a byte a weight. Then add the scales.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `math.ceil(count / 64)` blocks of weights, and `math.ceil(blocks / 256)` blocks of scales.
#
# </details>


# %% tags=["solution"]
def linear_bytes(rows, columns, scheme):
    """Bytes of a matrix with its scales, a whole number."""
    count = rows * columns
    if scheme == "bf16":
        return 2 * count
    if scheme == "int8":
        return count + 4 * rows
    blocks = -(-count // 64)
    return -(-count // 2) + blocks + 4 * -(-blocks // 256) + 4


# %% [markdown]
# ### Exercise 3: int8 (medium, 10 minutes)
#
# Give two tensors: the codes of a matrix in `torch.int8`, and the largest absolute value of each row in `torch.float32`,
# shape `[rows]`. Codes go from −127 to 127. A row of zeros has to stay one. The matrix may be in `bfloat16`.


# %% tags=["exercise"]
def quantize_to_rows(matrix):
    """(int8 codes [rows, columns], float32 absmax [rows])."""
    raise NotImplementedError


# %%
check("quantize_to_rows", quantize_to_rows)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `matrix.float()` first. Then `abs()` and `amax(dim=1)`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `absmax[:, None]` has one number for each row, and can be divided by. A zero among them: `clamp(min=1e-30)`.
#
# </details>


# %% tags=["solution"]
def quantize_to_rows(matrix):
    """(int8 codes [rows, columns], float32 absmax [rows])."""
    absmax = matrix.float().abs().amax(dim=1)
    codes = (matrix.float() * 127 / absmax[:, None].clamp(min=1e-30)).round()
    return codes.to(torch.int8), absmax


# %% [markdown]
# ### Exercise 4: outliers (medium, 15 minutes)
#
# `x` is `[tokens, channels]`. Give three tensors: the outlier channels (`int64`, those in which at least one token's absolute
# value is `threshold` or more), and codes and absmax, as in exercise 3, of the tokens *without* these channels (set to
# zero).


# %% tags=["exercise"]
def split_outliers(x, threshold):
    """(outlier channels, int8 codes [tokens, channels], float32 absmax [tokens])."""
    raise NotImplementedError


# %%
check("split_outliers", split_outliers)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `x.abs().amax(dim=0)` is the largest of each channel. `.nonzero()[:, 0]` gives the places where something is true.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `x.index_fill(1, channels, 0.0)` is a copy with these columns set to zero.
#
# </details>
# <details><summary>Hint 3</summary>
#
# `quantize_rows` of this lesson does the rest.
#
# </details>


# %% tags=["solution"]
def split_outliers(x, threshold):
    """(outlier channels, int8 codes [tokens, channels], float32 absmax [tokens])."""
    channels = (x.abs().amax(dim=0) >= threshold).nonzero()[:, 0]
    return channels, *quantize_rows(x.index_fill(1, channels, 0.0))


# %% [markdown]
# ### Exercise 5: read NF4 (hard, 20 minutes)
#
# `packed` has two 4-bit indices a byte, the first in the upper half. `code` has the 16 levels, `absmax` a scale for each block
# of 64 weights (here the scales are not rounded). Give the weights, `float32`, in one row.


# %% tags=["exercise"]
def unpack_nf4(packed, absmax, code):
    """Weights in float32, two for each byte."""
    raise NotImplementedError


# %%
check("unpack_nf4", unpack_nf4)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `packed >> 4` is the upper half of each byte, `packed & 15` the lower.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.stack([upper, lower], dim=1).flatten()` puts the two of one byte side by side.
#
# </details>
# <details><summary>Hint 3</summary>
#
# Look the indices up in `code` (as `.int()`: PyTorch takes bytes for masks), then multiply by `absmax.repeat_interleave(64)`.
#
# </details>


# %% tags=["solution"]
def unpack_nf4(packed, absmax, code):
    """Weights in float32, two for each byte."""
    indices = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
    return code[indices.int()] * absmax.repeat_interleave(64)


# %% [markdown]
# ## Recap
#
# 1. The peak is the largest stage's weights plus its activations. The planner says it before anything is downloaded.
# 2. int8: a code from −127 to 127 and a scale for each row, less than 1 % off. Large channels of the tokens are
#    multiplied apart.
# 3. NF4: 16 quantiles of the normal distribution and a scale for each 64 weights, 9 to 10 % off; 4.127 bits with
#    scales of scales.
# 4. Hoisting drops 27 % of the transformer, exactly. Stages hold one model at a time, streaming two blocks at a time.
# 5. Memory is bought with exactness (quantization) or with reading (streaming).
#
# **Next**: lesson 14 picks up the same velocity, of shape `[1, 64, 64]`, and asks how soon it can be had: making it fast.
