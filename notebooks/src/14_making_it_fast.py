# %% [markdown]
# # 14 · Making it fast
#
# After this lesson you can
#
# - find out where the milliseconds of a step go, and predict what a trick gains before you write it;
# - make the network faster without changing what it computes, and prove that nothing changed;
# - place any piece of work on a roofline, and say whether arithmetic, memory or bookkeeping holds it back.
#
# **Time**: less than a minute to run, 75 minutes to study. **You need**: lessons 05 to 08 and 10.

# %%
import statistics

import diffusers
import torch
import torch.nn.functional as F
from IPython.display import Markdown
from jaxtyping import Float
from torch import Tensor

import flux_lab
from flux_lab import inference, instruments, shapes
from flux_lab.inference import benchmark, benchmark_report, fast_transformer
from flux_lab.inference.fast import FastFluxPipeline
from flux_lab.inference.fast_linear import FastLinear
from flux_lab.instruments import FLUX_1_DEV, Table, explore, plots, show, source
from flux_lab.instruments.stopwatch import time_by_kind
from flux_lab.instruments.work import flops_by_part
from flux_lab.latents import pack_latents, prepare_latent_image_ids, prepare_noise

torch.set_grad_enabled(False)  # nothing is trained here
pipe = flux_lab.load_mini()
pipe.set_progress_bar_config(disable=True)
mini = instruments.anatomy_of(pipe)  # its sizes

# %% [markdown]
# ## You are here
#
# Everywhere, and most of all in the loop: it runs the transformer once for every noise level. The code of the lessons
# before was written to be read. `inference.fast(pipe)` makes a second pipeline from the same weights, written to be
# fast. You never have to choose between the two: they compute the same.

# %%
show(
    plots.pipeline_map("transformer", shapes=(mini, FLUX_1_DEV)),
    alt="Map of the pipeline with the transformer lit: tokens of shape [1, 64, 64] go in, a velocity of the same shape"
    " comes out; in FLUX.1-dev [1, 4096, 64].",
)

# %% [markdown]
# ## The idea
#
# A network is a list of **operations**: a product of matrices, a norm, an addition. Each costs three things.
#
# - **Arithmetic.** A *FLOP* is one multiplication or one addition. A machine does at most $R$ FLOPs a second.
# - **Memory.** Numbers are read and written. A machine moves at most $B$ bytes a second.
# - **The call itself.** Python finds the operation, PyTorch finds the right code for it, a result is allocated: a few
#   microseconds, $t_0$, however small the tensors are.
#
# Arithmetic and memory work side by side, so the longer one counts. Calls come one after the other:
#
# $$t \;\approx\; n\, t_0 + \max\left(\frac{\text{FLOPs}}{R}, \frac{\text{bytes}}{B}\right)$$
#
# $t$ and $t_0$ are in seconds, $n$ is the number of calls. With this line a gain can be **predicted**. A prediction that
# fails is worth more than one that holds: it shows what you have not understood.
#
# First the three numbers of the machine that you sit at:


# %%
def seconds(call, repeats=30):
    """The median time of one call."""
    call()
    return statistics.median(benchmark.seconds_of(call, "cpu") for _ in range(repeats))


rate = benchmark.product_rate(1024, torch.float32, "cpu")
bandwidth = benchmark.memory_rate("cpu", count=2**24)
one, dot = torch.ones(1), torch.nn.Linear(1, 1)
small_call, linear_call = seconds(lambda: one.add_(1), 500), seconds(lambda: dot(one), 500)
print(f"R  {rate / 1e9:7.0f} GFLOP/s, measured on a large product")
print(f"B  {bandwidth / 1e9:7.1f} GB/s, measured on a large copy")
print(
    f"t0 {1e6 * small_call:7.1f} µs for the smallest addition, {1e6 * linear_call:.1f} µs for the smallest linear layer"
)

# %% [markdown]
# ### Profile first
#
# Before you change anything, look where the time goes. One step of the miniature: this is what it is given.

# %%
PROMPT = "a large shiny red sphere to the left of a small blue cube on a wooden floor"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


text = pipe.encode_prompt(PROMPT)
x = pack_latents(prepare_noise(mini.shapes()["latents"], seeded()))
img_ids = prepare_latent_image_ids(rows=8, columns=8)
given = {
    "encoder_hidden_states": text.prompt_embeds,
    "pooled_projections": text.pooled_prompt_embeds,
    "img_ids": img_ids,
    "txt_ids": text.text_ids,
    "guidance": torch.tensor([3.5]),
}
inputs = {"hidden_states": x, "timestep": torch.tensor([0.5]), **given}

# %% [markdown]
# Three networks with the same weights: the reference in `diffusers`, ours, and ours made fast. The fast one is used in
# two parts: `prepare` once for a picture, `step` for every noise level. `time_by_kind` sorts PyTorch's operations by what
# they are for.

# %%
folder = flux_lab.data_dir() / "flux-mini"
reference = diffusers.FluxTransformer2DModel.from_pretrained(
    folder, subfolder="transformer", dtype=torch.float32
)
model = pipe.transformer
quick = fast_transformer.FastFluxTransformer2DModel(model)
prepared = quick.prepare(timesteps=torch.linspace(1, 1 / 28, 28)[:, None], **given)
at_half = quick.prepare(timesteps=torch.tensor([[0.5]]), **given)
steps = {
    "diffusers": lambda: reference(**inputs, return_dict=False)[0],
    "ours": lambda: model(**inputs),
    "ours, fast": lambda: quick.step(x, at_half, 0),
}
timings = {name: time_by_kind(call, repeats=4) for name, call in steps.items()}

# %%
show(
    plots.stacked_bars(
        {
            name: {kind: 1000 * each for kind, each in timing.kinds.items()}
            for name, timing in timings.items()
        },
        xlabel="milliseconds of one step",
    ),
    alt="One bar for each of the three networks, cut into kinds of work, from products to bookkeeping.",
)
for name, timing in timings.items():
    share = timing.kinds["matrix products"] / timing.seconds
    print(
        f"{name:11} {1000 * timing.seconds:6.1f} ms, {timing.operations:6,} operations, {share:.0%} of the time in matrix products"
    )

# %% [markdown]
# *What to see*: the products of matrices are the work proper. In the fast network they are fewer and larger, which helps a
# little. What differs most is the rest: small arithmetic, and *Python and bookkeeping*. That part has no numbers in it at
# all; it is the price of the calls. So the plan for the miniature is: **fewer operations**.
#
# (The profiler itself takes about a microsecond for each operation, so the shares are good to some percent.)
#
# How short could a step be? All FLOPs at the rate $R$, and nothing else:

# %% tags=["nbval-check-output"]
work = {anatomy.name: flops_by_part(anatomy) for anatomy in (mini, FLUX_1_DEV)}
for name, parts in work.items():
    modulation = parts["double: modulation"] + parts["single: modulation"]
    total = sum(parts.values())
    print(
        f"{name:10} {total / 1e9:12,.2f} GFLOP a step, of which modulation {modulation / total:.3%}"
    )

# %%
least = sum(work["miniature"].values()) / rate
print(
    f"at R, the miniature's step takes {1000 * least:.1f} ms; the fast one took {1000 * timings['ours, fast'].seconds:.1f} ms"
)

# %% [markdown]
# ### How to measure
#
# A machine does other things too. Two measurements one after the other meet different minutes. So **alternate**: one call
# of this, one of that, again and again; take the ratio within each round; report the median, and the quartiles (a quarter
# of the rounds lies below the lower, a quarter above the upper).


# %%
def measured(without, trick, rounds=15):
    """The time with a trick as a share of that without: median and quartiles."""
    without(), trick()
    times = benchmark.alternate(
        {"without": without, "with": trick}, benchmark.Settings(repeats=rounds, seconds=0.4)
    )
    return benchmark.spread([b / a for a, b in zip(times["without"], times["with"], strict=True)])


tricks = {}


def note(name, predicted, result):
    tricks[name] = (predicted, tuple(result))
    print(
        f"{name}: predicted {predicted:.2f}, measured {result.median:.2f} ({result.low:.2f} to {result.high:.2f})"
    )


step = steps["ours, fast"]
step_time = timings["ours, fast"].seconds

# %% [markdown]
# ### Trick 1: hoist the modulation
#
# The adaptive norms (lesson 05) turn the conditioning vector into shift, scale and gate. The conditioning depends on the
# noise level, the guidance and the pooled text, **not on the picture**. So all 28 steps can be asked at once, before the
# loop, and a step only reads its row.
#
# *Prediction.* A linear layer with one row reads all its weights for two FLOPs each: memory counts, and two calls for
# each of 77 layers.

# %%
linears = quick.modulations
weight_bytes = sum(4 * linear.weight.numel() for linear in linears)
predicted = len(linears) * (linear_call + small_call) + weight_bytes / bandwidth
signal = torch.randn(1, 1, mini.transformer.inner_dim)


def step_and_modulation():
    for linear in linears:
        linear(F.silu(signal))
    return step()


print(
    f"{len(linears)} layers, {weight_bytes / 1e6:.1f} MB of weights: predicted {1000 * predicted:.2f} ms in every step"
)
note("hoisted modulation", step_time / (step_time + predicted), measured(step_and_modulation, step))

# %% [markdown]
# And in FLUX.1-dev? There the layers hold 27 % of all parameters, and once the table is made they can be dropped from
# memory (lesson 13 does). As *time* they are little, because the rest of a step is 74 TFLOP:

# %% tags=["nbval-check-output"]
giant = instruments.on_meta("transformer", FLUX_1_DEV)
for name, network in (("miniature", model), ("FLUX.1-dev", giant)):
    layers = [
        network.norm_out.linear,
        *(block.norm.linear for block in network.single_transformer_blocks),
    ]
    for block in network.transformer_blocks:
        layers += [block.norm1.linear, block.norm1_context.linear]
    held = sum(layer.weight.numel() + layer.bias.numel() for layer in layers)
    share = held / sum(parameter.numel() for parameter in network.parameters())
    width = network.norm_out.linear.in_features
    signals = sum(layer.out_features for layer in layers) // width
    print(f"{name:10} {len(layers)} layers, {held:,} parameters, {share:.0%} of all")
    print(f"{'':10} the table of 28 steps: 28 x {signals} x {width}")

# %% [markdown]
# ### Trick 2: one product in place of four
#
# A single-stream block multiplies the same input by four matrices: queries, keys, values, and the input of the MLP. Put
# the four matrices below one another, and one product gives all: the same FLOPs, a quarter of the calls.
#
# *Prediction.* At the miniature's width the calls matter. At half of FLUX.1-dev's width they should not.


# %%
def four_and_one(width, tokens):
    """Ratio of one product to four: predicted and measured."""
    layers = [torch.nn.Linear(width, out) for out in (width, width, width, 4 * width)]
    fused, rows = FastLinear(*layers), torch.randn(tokens, width)
    product = 2 * tokens * width * 7 * width / rate
    predicted = (linear_call + product) / (4 * linear_call + product)
    return predicted, measured(
        lambda: [layer(rows) for layer in layers],
        lambda: F.linear(rows, fused.weight, fused.bias),
        rounds=9,
    )


note("fused projections, width 96", *four_and_one(96, tokens=96))
note("fused projections, width 1536", *four_and_one(1536, tokens=96))

# %% [markdown]
# At the large width the calls are nothing. What is left of the trick, a gain or a loss, is how well the library cuts one wide matrix
# into pieces for the cache.
#
# ### Trick 3: ask the better library
#
# The library? PyTorch multiplies no matrices itself. On an x86 processor it has two libraries for that: MKL, which `F.linear` asks
# for float32, and oneDNN, which it asks for bfloat16 and for convolutions. Both add up the same products. `FastLinear` asks oneDNN
# for float32 as well, if the layer has 262,144 weights or more.
#
# *Prediction*: first measure the rate of each on a square matrix, then take their ratio for a layer of another shape. (On other
# processors there is only one library, and the ratio is 1.)

# %%
square, square_rows = torch.nn.Linear(1024, 1024, bias=False), torch.randn(1024, 1024)
both_libraries = {"F.linear": square, "FastLinear": FastLinear(square)}
each_rate = {
    name: 2 * 1024**3 / seconds(lambda layer=layer: layer(square_rows), 7)
    for name, layer in both_libraries.items()
}
for name, found in each_rate.items():
    print(f"{name:10} {found / 1e9:5.0f} GFLOP/s")
wide_layer, wide_rows = torch.nn.Linear(1536, 4 * 1536), torch.randn(96, 1536)
better = FastLinear(wide_layer)
torch.testing.assert_close(better(wide_rows), wide_layer(wide_rows), rtol=1e-4, atol=1e-4)
note(
    "better library, width 1536",
    each_rate["F.linear"] / each_rate["FastLinear"],
    measured(lambda: wide_layer(wide_rows), lambda: better(wide_rows), rounds=9),
)

# %% [markdown]
# Is the gain larger than predicted? The prediction was made at another shape: with few rows and many weights a library has to read much
# for each product, and the two differ most there. And why not for every layer? Ask oneDNN at several widths, also where `FastLinear`
# would not:


# %%
def onednn_share(width, tokens=96):
    """oneDNN's time as a share of MKL's, for a layer from `width` to four times as many channels."""
    plain, rows = torch.nn.Linear(width, 4 * width), torch.randn(tokens, width)
    asked = FastLinear(plain)
    asked.onednn = torch.backends.mkl.is_available()  # whatever its size
    return measured(lambda: plain(rows), lambda: asked(rows), rounds=60).median


widths = [48, 96, 192, 384, 768, 1536]
show(
    plots.lines(
        widths,
        {"oneDNN's time": [onednn_share(width) for width in widths], "MKL's": [1.0] * len(widths)},
        xlabel="width of the layer's input",
        ylabel="share of MKL's time",
    ),
    alt="oneDNN's time as a share of MKL's against the width of a layer, from 48 to 1536.",
)

# %% [markdown]
# *What to see*: where the curve crosses 1. In a narrow layer oneDNN's call costs more than its product gains. 262,144 weights are a
# width of 256 here, which is on the safe side: with fewer rows than these 96 the crossing lies further to the right.
#
# ### Trick 4: keep what does not change
#
# The text goes through a linear layer, and the positions become tables of cosines and sines (lesson 04), at every step the
# same. *Prediction*: the tables are made by many tiny operations, so count the calls.


# %%
def tables():
    return model.pos_embed(torch.cat([text.text_ids, img_ids])), model.context_embedder(
        text.prompt_embeds
    )


with shapes.checks(enabled=False):
    count = time_by_kind(tables).operations
    result = measured(lambda: (tables(), step()), step)
note(
    "cached tables", step_time / (step_time + count * small_call / 2), result
)  # half of the operations are views, nearly free

# %% [markdown]
# ### Trick 5: say more in one operation
#
# Normalise, multiply by 1 + scale, add the shift: four operations on the same numbers. But a layer norm has a weight and a
# bias of its own, which FLUX leaves empty. With weight = 1 + scale and bias = shift, *one* operation does it all.
#
# *Prediction*: one call for four. Look at the two forms:

# %%
wide = torch.randn(1, 96, 96)
shift, scale = torch.randn(1, 96), torch.randn(1, 96)


def several():
    return F.layer_norm(wide, (96,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def in_one():
    return fast_transformer.modulated_norm(wide, shift[0], weight)


weight = 1 + scale[0]  # made before the loop
torch.testing.assert_close(in_one(), several())
note("norm in one operation", 1 / 4, measured(several, in_one, rounds=200))

# %% [markdown]
# The same idea, elsewhere in the fast code: the rotation of queries and keys is one product of complex numbers; both are
# normalised together; the gate is `addcmul_`, multiply and add into the stream in one call.
#
# ### Trick 6: leave the checks outside
#
# Our readable code checks every shape. *Prediction*: what one check costs, times the number of checked calls. The fast
# network has no checks inside; a picture is checked once, at the door.


# %%
@shapes.shaped
def checked(
    a: Float[Tensor, "batch tokens dim"], b: Float[Tensor, "batch dim"]
) -> Float[Tensor, "batch tokens dim"]:
    return a


one_check = seconds(lambda: checked(wide, shift), 200)
calls = 19 * 9 + 38 * 6 + 10  # calls of checked functions in one step
without_checks = shapes.checks(enabled=False)(steps["ours"])
predicted = 1 - calls * one_check / timings["ours"].seconds
note("no shape checks", predicted, measured(steps["ours"], without_checks))

# %% [markdown]
# ### Trick 7: half the bits
#
# `bfloat16` keeps the range of `float32` and 8 bits of its precision. Half the bytes to move, and some processors multiply
# it faster. *Prediction*: only the products get faster, by the ratio of the two rates, measured on a small product.

# %%
small = [benchmark.product_rate(128, dtype, "cpu", 50) for dtype in (torch.float32, torch.bfloat16)]
share = timings["ours, fast"].kinds["matrix products"] / step_time
half = inference.fast(pipe, dtype=torch.bfloat16).transformer
given16 = {name: value.bfloat16() for name, value in given.items()}
prepared16, x16 = half.prepare(timesteps=torch.tensor([[0.5]]), **given16), x.bfloat16()


def half_step():
    return half.step(x16, prepared16, 0)


note("bfloat16", 1 - share + share * small[0] / small[1], measured(step, half_step))
print(f"and the velocity is off by {(half_step().float() - step()).norm() / step().norm():.1%}")

# %% [markdown]
# If your processor has no instructions for bfloat16, this is slower. Even if it has, a small step may be: norms and rotation go
# up to float32 and back. On a GPU, and for large products on newer processors, the gain can be large: the roofline at the end
# shows both rates of your machine. And it is the first trick that is *not* exact.
#
# ### Trick 8: several pictures at once
#
# Eight pictures in one batch need eight times the FLOPs, but no more calls than one. *Prediction*: what one step takes at the
# rate $R$ is paid eight times, all else once.

# %%
eight = {
    name: value.repeat(8, *[1] * (value.ndim - 1)) if not name.endswith("ids") else value
    for name, value in given.items()
}
eight_prepared, eight_x = (
    quick.prepare(timesteps=torch.full((1, 8), 0.5), **eight),
    x.repeat(8, 1, 1),
)
result = measured(
    lambda: [step() for _ in range(8)], lambda: quick.step(eight_x, eight_prepared, 0), rounds=7
)
note("batch of eight", (8 * least + step_time - least) / (8 * step_time), result)

# %% [markdown]
# ### Predicted and measured
#
# All tricks in one picture. The dotted line is "no gain".

# %%
show(
    plots.predictions(tricks),
    alt="For every trick a hollow diamond, the prediction, and a dot with its spread, the measurement.",
)

# %% [markdown]
# *What to see*: where diamond and dot are close, the formula has understood the machine. Where they are not, something else
# is at work. A norm has some work of its own, so one call for four is not a quarter of the time. A check of a
# function with many arguments costs more than one of the small function that we timed. And a part of a step is neither calls
# nor products: GELU and norms are paid for every picture of a batch.
#
# No trick is large alone. Together they make the fast step:

# %%
together = measured(steps["diffusers"], step)
print(
    f"fast step as a share of diffusers' {together.median:.2f} ({together.low:.2f} to {together.high:.2f})"
)
print(f"fast step as a share of ours       {measured(steps['ours'], step).median:.2f}")

# %% [markdown]
# ### Trick 9: let a compiler do it
#
# `torch.compile` reads the operations, joins what stands between the products into a few loops, writes them in C++ and
# compiles them: `inference.fast(pipe, compile=True)`. It needs a C++ compiler, and minutes for the first picture of each
# size, so it is not run here. This was measured with the benchmark of the package:
#
#     make bench BENCH=--compile                    # everything, also compiled: 24 minutes
#     flux-lab bench --compile --only step          # one step
#
# The stored results:

# %%
stored = benchmark_report.read(flux_lab.data_dir() / "measured" / "benchmark.json")
Markdown(benchmark_report.markdown(stored))

# %%
cases = benchmark_report.by_case(stored)
ratios = benchmark_report.ratios(stored, ("ours", "fast", "fast compiled"))
show(
    plots.ratio_bars(
        {name: each for name, each in ratios.items() if not name.startswith("one step, ")}
    ),
    alt="Bars for every case: the time of ours, fast and fast compiled as shares of the reference's.",
)

# %% [markdown]
# *What to see*: the gains are large where tensors are small, in the miniature. Blocks of FLUX.1-dev's width and T5's layers spend
# nearly all of their time in matrix products, so only the choice of the library counts (trick 3): in float32 the fast code asks
# another than the reference, compiled code asks the reference's, and in bfloat16 all ask the same. How well a library does is in
# the table's column *of the product rate*: the share of the rate that one large product reaches. (Above 100 % is possible, where
# a part of the reference's FLOPs is not needed.)
# *Its products alone*, where it was measured, is the part of `fast` that only faster products could make shorter: where it
# is nearly the ratio itself, nothing else is left to win.
#
# The same step with more image tokens, as it was measured then. The last curve is what the FLOPs alone would take:

# %%
growing = {}
for name, sides in cases.items():
    if name.startswith("one step, ") and name.endswith("tokens"):
        growing[int(name.split()[2])] = sides
        print(
            f"{name:21} fast takes {sides['fast']['ratio']['median']:.2f} of the reference's time"
        )

# %%
curves = {side: {} for side in ("reference", "ours", "fast", "FLOPs at R")}
for tokens, sides in growing.items():
    for side in ("reference", "ours", "fast"):
        curves[side][tokens] = sides[side]["seconds"]["median"]
    curves["FLOPs at R"][tokens] = sides["fast"]["flops"] / stored["rates"]["float32"]
show(
    plots.growth(curves, xlabel="image tokens", ylabel="seconds of one step"),
    alt="Seconds of one step against image tokens: reference, ours, fast, and the FLOPs alone.",
)

# %% [markdown]
# *What to see*: all curves bend upward, because the attention product grows with the square of the tokens. The more tokens,
# the less the calls matter, and the nearer the ratio comes to 1.
#
# ### Trick 10, not exact: skip most of a step
#
# Two steps in a row say nearly the same. **First-block caching** runs the first block in every step. If what it adds has
# changed by less than a threshold since the last full step, the other 56 blocks are left out, and what they added *then* is
# added again. It is off by default, because the picture changes. By how much? We compare with the exact run from the same
# seed: the relative error of the final latents.

# %%
caching = inference.fast(pipe)


def run(threshold, steps=20):
    """The last state of a run with this threshold, and how many of its steps were left out."""
    caching.transformer.cache_threshold = threshold
    *_, last = caching.steps(PROMPT, generator=seeded(), num_inference_steps=steps)
    return last, sum(change.reused for change in caching.cache_log)


# %%
exact = run(0.0)[0].latents
thresholds = [0.05, 0.1, 0.2, 0.4]
curves = {"steps left out, share": [], "error of the latents": []}
for threshold in thresholds:
    last, left_out = run(threshold)
    curves["steps left out, share"].append(left_out / 20)
    curves["error of the latents"].append((last.latents - exact).norm() / exact.norm())
show(
    plots.lines(thresholds, curves, xlabel="threshold", ylabel="share"),
    alt="Share of steps left out, and error of the latents, against the threshold.",
)

# %% [markdown]
# *What to see*: the higher the threshold, the more is left out. Where many steps are left out and the error is still small,
# caching pays. How far that is depends on the model and on the number of steps: with few steps, two in a row differ more.
#
# ### How it ends: the roofline
#
# Divide the FLOPs of some work by the bytes that it has to move: its **arithmetic intensity**. Work of high intensity is held
# back by $R$, work of low intensity by $B$: it cannot go faster than intensity × $B$. Both limits together look like a roof.
# For a linear layer with $s$ rows, from $i$ to $o$ channels, in numbers of $b$ bytes:
#
# $$\text{intensity} = \frac{2\, s\, i\, o}{b\,(s\, i + i\, o + s\, o)} \quad \text{FLOPs for each byte.}$$


# %%
def linear_work(rows, d_in, d_out):
    """FLOPs and intensity of a linear layer in float32."""
    flops = 2 * rows * d_in * d_out
    return flops, flops / (4 * (rows * d_in + d_in * d_out + rows * d_out))


def attention_work(sequence, dim):
    """FLOPs and intensity of an attention product: queries, keys and values are read, the result is written."""
    flops = 4 * sequence**2 * dim
    return flops, flops / (4 * 4 * sequence * dim)


# %%
rows, single, query = torch.randn(96, 96), quick.blocks[-1], torch.randn(1, 3, 96, 32)


def attention_product():
    return F.scaled_dot_product_attention(query, query, query)


points = {}
for name, (flops, intensity), call in (
    ("modulation layer, 1 row", linear_work(1, 96, 288), lambda: linears[-2](signal)),
    ("fused projection, 96 rows", linear_work(96, 96, 672), lambda: single.qkv_mlp(rows)),
    ("attention product, 96 tokens", attention_work(96, 96), attention_product),
    ("layer norm, 96 rows", (8 * 96 * 96, 1.0), lambda: F.layer_norm(rows, (96,))),
):
    points[f"miniature: {name}"] = (intensity, flops / seconds(call, 200))

# %%
step_bytes = 4 * sum(parameter.numel() for parameter in quick.blocks.parameters())
whole = sum(work["miniature"].values())
points["miniature: whole fast step"] = (whole / step_bytes, whole / step_time)
width, sequence = FLUX_1_DEV.transformer.inner_dim, FLUX_1_DEV.tokens + FLUX_1_DEV.length
marks = {
    "FLUX.1-dev: modulation layer, 1 row": linear_work(1, width, 3 * width)[1],
    "FLUX.1-dev: fused projection": linear_work(sequence, width, 7 * width)[1],
    "FLUX.1-dev: attention product": attention_work(sequence, width)[1],
}

# %%
roofs = {"float32": plots.Roof(rate, bandwidth)}
roofs["bfloat16"] = plots.Roof(benchmark.product_rate(1024, torch.bfloat16, "cpu"), bandwidth)
show(
    plots.roofline(roofs, points, marks),
    alt="Roofline: the rate rises with intensity, then is level. Dots: the miniature; hollow: FLUX.1-dev.",
)
for name, (intensity, reached) in points.items():
    share = reached / roofs["float32"].at(intensity)
    print(f"{name:40} {intensity:7.1f} FLOPs a byte, {share:4.0%} of the roof")

# %% [markdown]
# *What to see*: the roof's corner is where arithmetic and memory take equally long. A layer with one row stands far to the
# left in both models: that is the modulation, and that is why hoisting it is right at every size. The big products of
# FLUX.1-dev stand far to the right, under the flat part: only a higher $R$ helps them (a better library, bfloat16, a GPU), and no amount of
# cleverness around them. The miniature's dots hang *below* the roof: the small ones and the whole step because of $n\,t_0$, the
# two products mostly because they are too small for the library to reach $R$. A dot above the slope had its numbers in the
# **cache**, a small fast memory in the processor.
#
# ## The real code
#
# All of the fast transformer. First the products, then what stands between them:

# %%
source(FastLinear)

# %%
source(fast_transformer.unit_)

# %%
source(fast_transformer.rotate, docstring=False)

# %%
source(fast_transformer.attend, docstring=False)

# %% [markdown]
# The rotation has a second form for `torch.compile`, which knows no complex numbers. The two blocks:

# %%
source(fast_transformer.FastStream)

# %%
source(fast_transformer.FastTransformerBlock)

# %%
source(fast_transformer.FastSingleTransformerBlock)

# %% [markdown]
# Read the last one against lesson 07. `hidden` is one tensor of 3 + 4 = 7 widths: queries, keys, values, MLP. Attention writes
# its result where the values were, right beside the MLP's: so "concatenate both" costs nothing, the two already lie side by
# side. And the whole network: `prepare` before the loop, `step` in it.

# %%
source(fast_transformer.FastFluxTransformer2DModel, docstring=False)

# %% [markdown]
# `step` computes in *inference mode*, where PyTorch keeps no books for gradients, and gives out a plain tensor. The rest of the
# fast pipeline is shorter: the text encoders' layers are fused or replaced and T5's bias table is kept (`fast_text.py`), the decoder
# works with channels last in memory and doubles and smooths in one convolution (`fast_autoencoder.py`), and a negative prompt
# is one batch of two (`fast.py`):

# %%
source(FastFluxPipeline._guided_velocity)

# %% [markdown]
# ## Shapes
#
# Fused weights are taller, tables have all steps in one tensor. For a single picture the table's batch axis is left out, so
# that a row can be the weight of a layer norm.

# %% tags=["nbval-check-output"]
for name, config in (("miniature", mini.transformer), ("FLUX.1-dev", FLUX_1_DEV.transformer)):
    dim, signals = config.inner_dim, 12 * config.num_layers + 3 * config.num_single_layers + 2
    print(
        f"{name:10} double qkv [{3 * dim}, {dim}], single qkv + MLP [{7 * dim}, {dim}], table [28, {signals}, {dim}]"
    )
assert single.qkv_mlp.weight.shape == (7 * 96, 96)
assert quick.blocks[0].text.qkv.weight.shape == (3 * 96, 96)
assert prepared.modulation.shape == (28, 19 * 12 + 38 * 3 + 2, 96)
assert prepared.rotation.shape == (32 + 64, 1, 1, 32 // 2, 2)
assert quick.step(x, prepared, 0).shape == (1, 64, 64)

# %% [markdown]
# Now a wrong shape: 60 tokens of latents, and positions for 64. First to the readable network, then to the fast one.

# %%
for call in (
    lambda wrong: model(**inputs | {"hidden_states": wrong}),
    lambda wrong: quick.step(wrong, prepared, 0),
):
    try:
        call(x[:, :60])
    except (shapes.ShapeError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}\n")

# %% [markdown]
# The first names function, argument and axes. The second is PyTorch's own. That is what was given up for speed: so develop with
# the readable network, and run the fast one.
#
# ## Trust, then verify
#
# Fast and wrong is easy. The three networks, on the same input:

# %%
theirs = steps["diffusers"]()
for name in ("ours", "ours, fast"):
    difference = (steps[name]() - theirs).abs().max().item()
    print(
        f"{name:11} largest difference from diffusers {difference:.2g}, of numbers up to {theirs.abs().max():.2f}"
    )
    assert difference < 1e-3

# %% [markdown]
# Not equal to the last bit: a sum taken in another order rounds in another way. Does rounding grow over 14 steps? The whole
# way, from words to bytes:

# %%
fast_pipe = inference.fast(pipe)
fast_pipe.set_progress_bar_config(disable=True)
both = {"ours": pipe, "fast": fast_pipe}
seen = {
    name: list(each.steps(PROMPT, num_inference_steps=14, generator=seeded()))
    for name, each in both.items()
}
pairs = zip(*seen.values(), strict=True)
distance = [1e6 * ((a.latents - b.latents).norm() / a.latents.norm()).item() for a, b in pairs]
assert max(distance) < 1e6 * 1e-3
show(
    plots.lines(range(1, 15), {"distance, relative": distance}, xlabel="step", ylabel="millionths"),
    alt="Relative distance of the fast path's latents from ours after each of 14 steps, in millionths.",
)

# %%
pictures = [states[-1].image("latents") for states in seen.values()]
bytes_apart = (
    (torch.tensor(list(pictures[0].tobytes())) - torch.tensor(list(pictures[1].tobytes())))
    .abs()
    .max()
    .item()
)
print(f"the pictures differ by at most {bytes_apart} of 255")
assert bytes_apart <= 1
show(
    plots.gallery(pictures, ["ours", "ours, fast"]),
    alt="The picture of the readable pipeline and that of the fast one: they look the same.",
)

# %% [markdown]
# ## Turn the knob
#
# The threshold of the cache, and the number of steps. Watch when the picture starts to change, and how many steps are left out.

# %%
exact_pictures = {}


def cached(threshold=0.1, steps=20):
    if steps not in exact_pictures:
        exact_pictures[steps] = run(0.0, steps)[0].image("latents")
    last, left_out = run(threshold, steps)
    return plots.gallery(
        [exact_pictures[steps], last.image("latents")],
        ["exact", f"{left_out} of {steps} steps left out"],
    )


explore(
    cached,
    threshold=(0.0, 0.6, 0.02),
    steps=(4, 50),
    alt="The exact picture, and the one made with a threshold of 0.1.",
)

# %% [markdown]
# And the roof: where does one linear layer stand, and what holds it back? Move the rows from 1 to 4608 and the width from 96 to
# 3072.


# %%
def layer(rows=96, width=96):
    flops, intensity = linear_work(rows, width, width)
    parts = {
        "arithmetic": flops / rate,
        "memory": flops / intensity / bandwidth,
        "the call": linear_call,
    }
    parts = {name: 1e6 * each for name, each in parts.items()}
    return plots.stacked_bars({"one layer": parts}, xlabel="microseconds, if nothing overlapped")


explore(
    layer,
    rows=(1, 4608),
    width=(96, 3072, 96),
    alt="One bar for a layer of width 96 with 96 rows: arithmetic, memory and the call.",
)

# %% [markdown]
# ## Break it
#
# Hoisting and fusing move numbers to other places. Four mistakes that are made there, none of which raises an error. **Predict
# first**: which changes the picture least, and which most?
#
# - *one row late*: every step reads the modulation of the step before;
# - *no 1 in the scales*: the norm is multiplied by scale in place of 1 + scale;
# - *k, q, v*: the fused weights of the single-stream blocks in another order;
# - *rotated the wrong way*: the sines with the opposite sign.


# %%
def broken(made, mistake):
    """What was prepared, with one mistake."""
    if mistake == "one row late":
        made.modulation = torch.cat([made.modulation[:1], made.modulation[:-1]])
    if mistake == "no 1 in the scales":
        made.modulation[..., 1::3, :] -= 1
    if mistake == "rotated the wrong way":
        made.rotation[..., 1] *= -1
    return made


# %%
def with_mistake(mistake):
    """The last state of a fast pipeline with one mistake."""
    wrong = inference.fast(pipe)
    prepare = wrong.transformer.prepare
    wrong.transformer.prepare = lambda *arguments: broken(prepare(*arguments), mistake)
    for block in wrong.transformer.blocks[19:] if mistake == "k, q, v" else ():
        for tensor in (block.qkv_mlp.weight, block.qkv_mlp.bias):
            tensor[:192] = tensor[:192].roll(96, 0)
    *_, last = wrong.steps(PROMPT, num_inference_steps=14, generator=seeded())
    return last


# %%
results = {"right": pictures[1]}
right = seen["fast"][-1].latents
for mistake in ("one row late", "no 1 in the scales", "k, q, v", "rotated the wrong way"):
    state = with_mistake(mistake)
    results[mistake] = state.image("latents")
    print(f"{mistake:22} error of the latents {(state.latents - right).norm() / right.norm():.3f}")
show(
    plots.gallery(list(results.values()), list(results)),
    alt="Five pictures: the right one, and one for each of the four mistakes.",
)

# %% [markdown]
# *What to see*: order the four by their error. *One row late* is the treacherous one: neighbouring rows are alike, so the
# picture is nearly right, and nobody looks twice. Only the comparison with the reference finds it.
#
# ## Common misreadings
#
# **"FLOPs tell the time."** They tell it for large products only. Share of the FLOPs, and share of the time that the
# products take in the miniature:

# %%
mini_work = work["miniature"]
flops_of = {"modulation": mini_work["double: modulation"] + mini_work["single: modulation"]}
flops_of["attention product"] = mini_work["attention product"]
time_of = {"modulation": seconds(lambda: [linear(signal) for linear in linears])}
time_of["attention product"] = 57 * seconds(attention_product, 200)
rows_of_table = [
    (part, f"{flops_of[part] / whole:.1%}", f"{time_of[part] / timings['ours'].seconds:.1%}")
    for part in flops_of
]
Table(("part", "share of the FLOPs", "share of a readable step's time"), rows_of_table)

# %% [markdown]
# **"27 % of the parameters hoisted is 27 % less time."** Parameters cost memory; time is FLOPs, bytes and calls. In FLUX.1-dev
# the hoisted layers are a tiny part of the work:

# %% tags=["nbval-check-output"]
dev = work["FLUX.1-dev"]
share = (dev["double: modulation"] + dev["single: modulation"]) / sum(dev.values())
print(f"FLUX.1-dev: the modulation is {share:.4%} of the FLOPs of a step")
assert share < 0.001

# %% [markdown]
# **"I measured it once, it is faster."** The same step, forty times:

# %%
times = sorted(1000 * benchmark.seconds_of(step, "cpu") for _ in range(40))
show(
    plots.lines(
        range(1, 41),
        {"the same fast step": times},
        xlabel="call, sorted by its time",
        ylabel="milliseconds",
    ),
    alt="Forty times of the same step, sorted: they rise from the shortest to the longest.",
)
print(f"shortest {times[0]:.1f} ms, median {times[20]:.1f} ms, longest {times[-1]:.1f} ms")

# %% [markdown]
# Two single measurements may stand anywhere on this curve. A difference smaller than its height means nothing: take medians of
# alternating calls.
#
# **"Compiling is always worth it."** Only after enough pictures. If compiling takes a minute, it must save a minute. From
# the stored benchmark:

# %%
for batch in (1, 8):
    sides = cases[f"end to end, 28 steps, batch {batch}"]
    eager, compiled = (
        sides[side]["seconds"]["median"] / batch for side in ("fast", "fast compiled")
    )
    after = (
        f"a minute of compiling is earned back after {60 / (eager - compiled):,.0f} pictures"
        if eager > compiled
        else "it never pays"
    )
    print(f"{batch} at a time: compiled saves {eager - compiled:.2f} s a picture: {after}")

# %% [markdown]
# **"Caching makes it faster for free."** You have seen its error above. Whoever gives a speed-up by caching must give the error
# beside it.
#
# ## Your turn
#
# ### Exercise 1: how long will it take? (easy, 10 minutes)
#
# Write the formula of this lesson. `rate` is in FLOPs a second, `bandwidth` in bytes a second, `call_seconds` is the fixed cost of
# one call.


# %% tags=["exercise"]
def predicted_seconds(flops, bytes_moved, calls, rate, bandwidth, call_seconds):
    """Seconds of `calls` operations."""
    raise NotImplementedError


# %%
from flux_lab.exercises import check

check("predicted_seconds", predicted_seconds)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Three times: `calls * call_seconds`, `flops / rate`, `bytes_moved / bandwidth`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Two of the three happen at the same time.
#
# </details>


# %% tags=["solution"]
def predicted_seconds(flops, bytes_moved, calls, rate, bandwidth, call_seconds):
    """Seconds of `calls` operations."""
    return calls * call_seconds + max(flops / rate, bytes_moved / bandwidth)


# %% [markdown]
# ### Exercise 2: the intensity of a linear layer (easy, 10 minutes)
#
# FLOPs for each byte of a linear layer from `d_in` to `d_out` channels, without a bias, for `tokens` rows. Input and weights are read
# once, the output is written once; a number takes `number_bytes` bytes.


# %% tags=["exercise"]
def linear_intensity(tokens, d_in, d_out, number_bytes):
    """FLOPs for each byte moved."""
    raise NotImplementedError


# %%
check("linear_intensity", linear_intensity)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Three matrices: input `[tokens, d_in]`, weights `[d_out, d_in]`, output `[tokens, d_out]`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Every number of the output takes `d_in` multiplications and as many additions.
#
# </details>


# %% tags=["solution"]
def linear_intensity(tokens, d_in, d_out, number_bytes):
    """FLOPs for each byte moved."""
    flops = 2 * tokens * d_in * d_out
    numbers = tokens * d_in + d_in * d_out + tokens * d_out
    return flops / (number_bytes * numbers)


# %% [markdown]
# ### Exercise 3: one layer in place of several (medium, 10 minutes)
#
# `weights` is a list of tensors `[d_out, d_in]` with the same `d_in`, `biases` a list of tensors `[d_out]`. Return the weight and the
# bias of the one layer whose output holds theirs side by side, in the order of the list.


# %% tags=["exercise"]
def fuse_linears(weights, biases):
    """(weight, bias) of the fused layer."""
    raise NotImplementedError


# %%
check("fuse_linears", fuse_linears)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `F.linear(x, weight, bias)` is `x @ weight.T + bias`: each output has a row of the weight.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.cat` joins along the first axis when you say nothing else.
#
# </details>


# %% tags=["solution"]
def fuse_linears(weights, biases):
    """(weight, bias) of the fused layer."""
    return torch.cat(weights), torch.cat(biases)


# %% [markdown]
# ### Exercise 4: hoist a norm (medium, 15 minutes)
#
# `conditioning` `[steps, dim]` holds the conditioning vector of every step. An adaptive norm has the linear layer `weight`
# `[signals * dim, dim]`, `bias` `[signals * dim]`, with a SiLU in front. Its outputs are signals, `dim` numbers each, in the order
# shift, scale, gate, and perhaps again shift, scale, gate. Return the table `[steps, signals, dim]`, with 1 added to every scale.


# %% tags=["exercise"]
def modulation_table(conditioning, weight, bias):
    """All signals of all steps: [steps, signals, dim]."""
    raise NotImplementedError


# %%
check("modulation_table", modulation_table)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A linear layer takes all steps at once: they are its rows.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `.unflatten(-1, (signals, dim))` splits the last axis; the first `dim` numbers become the first signal.
#
# </details>
# <details><summary>Hint 3</summary>
#
# The scales are the signals 1, 4, …: `table[:, 1::3]`.
#
# </details>


# %% tags=["solution"]
def modulation_table(conditioning, weight, bias):
    """All signals of all steps: [steps, signals, dim]."""
    dim = conditioning.shape[1]
    table = F.linear(F.silu(conditioning), weight, bias).unflatten(-1, (len(bias) // dim, dim))
    table[:, 1::3] += 1
    return table


# %% [markdown]
# ### Exercise 5: when may a step be skipped? (hard, 20 minutes)
#
# `firsts` is a list: what the first block added in each step. Return a list of bool: True where the other blocks are left out. The
# change is the mean of |first − last| divided by the mean of |last|, where `last` is what the first block added at the **last full
# step**. A step is left out if its change is below `threshold`. The first step is always full.


# %% tags=["exercise"]
def reused_steps(firsts, threshold):
    """Whether each step is left out."""
    raise NotImplementedError


# %%
check("reused_steps", reused_steps)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Keep a variable `last`, None at the start.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `last` changes only when a step is full. Otherwise small changes would add up unseen.
#
# </details>


# %% tags=["solution"]
def reused_steps(firsts, threshold):
    """Whether each step is left out."""
    reused, last = [], None
    for first in firsts:
        skip = (
            last is not None
            and ((first - last).abs().mean() / last.abs().mean()).item() < threshold
        )
        if not skip:
            last = first
        reused.append(skip)
    return reused


# %% [markdown]
# ## Recap
#
# 1. Time is calls × $t_0$, plus the longer of FLOPs / $R$ and bytes / $B$. Profile first, predict, then measure alternating.
# 2. The miniature is held back by the number of calls: hoist, fuse, keep tables, say more in one operation. FLUX.1-dev's blocks are
#    held back by $R$: only a better library or cheaper arithmetic helps them.
# 3. The modulation never sees the picture: made once for all steps, exactly. It is 27 % of the parameters and next to none of the
#    work.
# 4. bfloat16 and caching change the result; all the rest equals the reference up to rounding. Say which, and by how much.
# 5. A fast network is proved by comparison with the readable one, not by looking at its pictures.
#
# **Next**: the course ends here. The tensor that you pick up now is your own: `[1, 64, 64]`, noise. Give it words.
