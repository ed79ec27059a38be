# %% [markdown]
# # 09 · The sigma schedule: which noise levels, and one step between two of them
#
# After this lesson you can
#
# - compute the noise levels of a run for any number of steps and any size of picture, by hand;
# - say what the shift μ does, why it grows with the picture, and what happens without it;
# - take an Euler step and mix a picture with noise, and tell both from wrong versions that are in print.
#
# **Time**: half a minute to run, 60 minutes to study. **You need**: lesson 00.

# %%
import textwrap
from itertools import pairwise

import numpy as np
import torch
from einops import rearrange
from PIL import Image

import flux_lab
from flux_lab import instruments
from flux_lab.instruments import FLUX_1_DEV, config_table, explore, plots, show, source
from flux_lab.latents import pack_latents

torch.set_grad_enabled(False)  # nothing is trained here
pipe = flux_lab.load_mini()
pipe.set_progress_bar_config(disable=True)
mini = instruments.anatomy_of(pipe)
scheduler = pipe.scheduler


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## You are here

# %%
show(
    plots.pipeline_map("sigma_schedule", shapes=(mini, FLUX_1_DEV)),
    alt="Map of the pipeline with the scheduler lit: velocity goes in, the next tokens come out and"
    " go back to the transformer.",
)

# %% [markdown]
# The **scheduler** is the small box in the loop. It has no weights. It does two things: it chooses the noise levels
# before the loop starts, and it takes the step from one level to the next.
#
# ## The idea
#
# Training mixes a picture with noise. The picture, encoded, is a tensor $x_0$. The noise $n$ has the same shape. The
# **noise level** $\sigma$ (sigma), a number from 0 to 1, is the share of the noise:
#
# $$x_\sigma = (1 - \sigma)\, x_0 + \sigma\, n$$
#
# This is called the **forward process**. All three tensors are `[1, 64, 64]` in the miniature and `[1, 4096, 64]` in
# FLUX.1-dev: tokens × numbers in a token. Let us do it to a picture of the miniature's world. Our own ray tracer draws
# it at any size.

# %%
from flux_lab.training.raytrace import render
from flux_lab.training.world import Scene, SceneObject

ball = SceneObject("sphere", "red", "large", "shiny", x=-1.1, y=0.2)
cube = SceneObject("cube", "blue", "small", "matte", x=1.3, y=-0.4, turn=0.5)
scene = Scene((ball, cube), floor="wooden", relation="left of")


def rendered(pixels):
    """The scene as an image tensor [1, 3, pixels, pixels] from -1 to 1."""
    image = torch.from_numpy(render([scene], pixels))
    return rearrange(image, "scenes height width rgb -> scenes rgb height width") / 127.5 - 1


def to_pil(image):
    return pipe.image_processor.postprocess(image, output_type="pil")[0]


# %%
latents = pipe.vae.encode(rendered(128)).mode()  # lesson 11 opens this line and the next
x0 = pack_latents((latents - mini.vae.shift_factor) * mini.vae.scaling_factor)
noise = torch.randn(x0.shape, generator=seeded())
levels = [0.0, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0]
mixtures = [(1 - sigma) * x0 + sigma * noise for sigma in levels]
show(
    plots.small_grid(
        {"": pipe.decode(torch.cat(mixtures), 128, 128)}, [f"σ = {sigma}" for sigma in levels]
    ),
    alt="A red ball and a blue cube, mixed with more and more noise from left to right; at σ = 1"
    " nothing is left of them.",
)

# %% [markdown]
# *What to see*: the mixtures, decoded. The picture fades while the noise grows. The VAE's decoder was never shown
# noise, so its colours are its own.
#
# ### Straight paths
#
# Follow a single number of the tensor while $\sigma$ goes from 1 to 0. Its value is $\sigma$ times one constant plus
# $1 - \sigma$ times another: a straight line. The slope is the **velocity** $v = n - x_0$, the change for one unit of
# $\sigma$. The network is trained to say $v$.
#
# Sampling has no $x_0$ to start from. It asks the network for $v$, takes a step, and asks again. Are its paths straight
# too?

# %%
PROMPT = "a large shiny red sphere to the left of a small blue cube on a wooden floor"
states = list(pipe.steps(PROMPT, latents=noise, num_inference_steps=14))
walk = torch.stack([noise, *(state.latents for state in states)])
some = [token * 64 + channel for token, channel in ((9, 0), (20, 17), (27, 40), (35, 8))]
levels = scheduler.sigmas
numbers = torch.stack([noise + (sigma - 1) * (noise - x0) for sigma in levels])
show(
    plots.level_paths(
        {
            "in training: from noise to one picture": (levels, numbers.flatten(1)[:, some]),
            "in sampling: where the network leads": (levels, walk.flatten(1)[:, some]),
        },
        ylabel="value of one number of the latents",
    ),
    alt="Four numbers of the latents against the noise level. Left: four straight lines. Right:"
    " four curves.",
)

# %%
straight = (walk[-1] - walk[0]).norm()
length = (walk[1:] - walk[:-1]).flatten(1).norm(dim=1).sum()
print(
    f"the walk is {length / straight:.3f} times as long as the straight line from its start to its"
    " end"
)

# %% [markdown]
# *What to see*: on the left, lines without a bend. On the right, the walk starts from the same noise. Each point is one
# call of the network. Between two points the walk is straight, but from point to point it turns. If it did not turn,
# one step would be enough, and this lesson would be short.
#
# ### Why the walk turns
#
# A world so small that everything can be computed: a picture is *one number*, either +1 or −1. In training, straight
# paths lead from any noise to either of the two, and they cross. Where they cross, the network cannot know which of the
# two is meant. The best answer is the mean velocity of all paths through that point. For this world we can write it down:
#
# $$\bar x_0 = \tanh\!\big(x\,(1-\sigma)/\sigma^2\big), \qquad v = (x - \bar x_0)/\sigma$$
#
# $\bar x_0$ is the mean picture, given $x$. The second equation is the forward process, solved for $n - x_0$.


# %%
def toy_velocity(x, sigma):
    picture = torch.tanh(x * (1 - sigma) / sigma**2)
    return (x - picture) / sigma


def toy_walk(starts, sigmas):
    path = [starts]
    for sigma, sigma_next in pairwise(sigmas):
        path.append(path[-1] + (sigma_next - sigma) * toy_velocity(path[-1], sigma))
    return torch.stack(path)


# %%
starts = torch.linspace(-2, 2, 12)
pictures = torch.randint(0, 2, (12,), generator=seeded(2)) * 2 - 1.0
fine = torch.linspace(1, 0, 201)
lines = torch.stack([(1 - sigma) * pictures + sigma * starts for sigma in fine])
show(
    plots.level_paths(
        {"in training": (fine, lines), "in sampling, 200 steps": (fine, toy_walk(starts, fine))},
        ylabel="the number x",
        by_end=True,
    ),
    alt="12 paths from noise to +1 or -1. Left: straight lines that cross. Right: curves that do"
    " not cross and part at zero.",
)

# %% [markdown]
# *What to see*: blue paths end at +1, orange ones at −1. On the right no two paths cross. At $\sigma = 1$ all head
# for the mean of the two pictures, 0, because nothing is decided yet. Then each bends towards the picture on its
# side. In FLUX.1 it is the same with 262,144 numbers in place of one: first everything heads for the mean of all
# pictures that fit the words, and the decisions make the path bend.
#
# ### One Euler step
#
# A walk along a direction that changes, in straight pieces, is **Euler's method**:
#
# $$x \leftarrow x + (\sigma_\text{next} - \sigma)\, v$$
#
# By hand, and by the scheduler. It wants a level for each step, so we give it four, and a number `mu` that is explained
# below.

# %% tags=["nbval-check-output"]
scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.0)
print("sigmas   ", scheduler.sigmas.tolist())
print("timesteps", scheduler.timesteps.tolist())
velocity = torch.randn(x0.shape, generator=seeded(3))
by_hand = noise + (scheduler.sigmas[1] - scheduler.sigmas[0]) * velocity
by_scheduler = scheduler.step(velocity, scheduler.timesteps[0], noise)
print("the same numbers:", torch.equal(by_hand, by_scheduler))
assert torch.equal(by_hand, by_scheduler)

# %% [markdown]
# Four levels went in, five `sigmas` came out: the scheduler appends the 0 where the last step arrives. A **timestep** is
# $1000\,\sigma$. It names a level; it does not count steps.
#
# ## Which levels
#
# The walk bends more at some levels than at others. Steps are best spent there. FLUX.1 starts from evenly spaced levels,
# and then moves them.
#
# ### Evenly spaced
#
# For $N$ steps: $1,\ 1 - 1/N,\ \dots,\ 1/N$.

# %% tags=["nbval-check-output"]
from flux_lab.scheduler import calculate_shift, default_sigmas

for steps in (1, 2, 4, 5):
    print(steps, "steps:", default_sigmas(steps).round(4).tolist())
assert np.array_equal(default_sigmas(28), np.linspace(1, 1 / 28, 28))

# %% [markdown]
# ### A larger picture needs more noise
#
# The same picture, small and large, mixed with noise of the same $\sigma$. **Predict first**: in which one can you see
# more?

# %%
sides, rows = (16, 32, 128), {"σ = 0": [], "σ = 0.7": []}
for pixels in sides:
    image = rendered(pixels)
    gray = torch.randn(1, 1, pixels, pixels, generator=seeded(4))
    for row, each in zip(rows.values(), (image, 0.3 * image + 0.7 * gray), strict=True):
        row.append(to_pil(each).resize((128, 128), Image.Resampling.NEAREST))
show(
    plots.small_grid(rows, [f"{pixels} x {pixels} pixels" for pixels in sides], cell=1.34),
    alt="The scene at 16, 32 and 128 pixels a side, without noise above and at σ = 0.7 below. In"
    " the largest one the objects can still be made out, in the smallest they are blots.",
)

# %% [markdown]
# *What to see*: in a large picture your eye averages over neighbours, and noise that is averaged gets weaker. In a small
# one there is little to average. Measured: average the noise of the largest over blocks of 8 × 8, down to 16 × 16.

# %% tags=["nbval-check-output"]
big = torch.randn(1, 1, 128, 128, generator=seeded(5))
averaged = torch.nn.functional.avg_pool2d(big, 8)
print(f"strength of the noise: {big.std():.2f}, averaged over 8 x 8 pixels: {averaged.std():.2f}")

# %% [markdown]
# About an 8th: averaging over $k$ numbers divides the noise by $\sqrt k$. So a larger picture shows itself at a higher
# $\sigma$, and what is decided at $\sigma = 0.5$ in a small picture is decided nearer to 1 in a large one. The steps have
# to move up with it. Neighbouring latents look alike as pixels do, so this holds for them as well.
#
# ### μ: a straight line
#
# FLUX.1 puts the size into one number, **μ** (mu). It is a straight line in the number of image tokens, through two fixed
# points: 256 tokens, 0.5 and 4096 tokens, 1.15. A token covers 16 × 16 pixels.


# %% tags=["nbval-check-output"]
def mu_by_hand(tokens):
    return 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)


for pixels in (128, 256, 512, 768, 1024, 1536, 2048):
    tokens = (pixels // 16) ** 2
    note = {mini.tokens: "the miniature", FLUX_1_DEV.tokens: "FLUX.1-dev"}.get(tokens, "")
    print(
        f"{pixels:4} pixels {tokens:6} tokens   mu {mu_by_hand(tokens):.4f}   e^mu"
        f" {np.exp(mu_by_hand(tokens)):7.3f}  {note}"
    )
    assert abs(mu_by_hand(tokens) - calculate_shift(tokens)) < 1e-12

# %%
show(
    plots.mu_line(
        {
            "128 px": 64,
            "512 px": 1024,
            "768 px": 2304,
            "1024 px": 4096,
            "1360 x 768 px": 4080,
            "1536 px": 9216,
        }
    ),
    alt="A straight line of μ against image tokens with its two fixed points, and the pictures of"
    " several sizes on it.",
)

# %% [markdown]
# *What to see*: the line does not stop at its fixed points. At 64 tokens, the miniature's, μ is a little under 0.5. At
# 2048 × 2048 pixels it is 3.2, and $e^\mu$, which is what counts, is large: pictures of that size spend nearly all steps
# close to pure noise. The number of tokens counts, not the shape: 1360 × 768 has nearly the μ of 1024 × 1024.
#
# ### What μ does
#
# Call $\sigma / (1 - \sigma)$ the **odds**: noise against picture. The shift multiplies the odds by $e^\mu$:
#
# $$\frac{\sigma'}{1 - \sigma'} = e^\mu\, \frac{\sigma}{1 - \sigma}
# \qquad\Longleftrightarrow\qquad
# \sigma' = \frac{e^\mu}{e^\mu + (1/\sigma - 1)}$$
#
# The right-hand form is the one in the code. 0 stays 0, 1 stays 1, and everything between them moves up.


# %% tags=["nbval-check-output"]
def shift_by_odds(sigma, mu):
    odds = np.exp(mu) * sigma / (1 - sigma)
    return odds / (1 + odds)


for name, mu in {
    "no shift": 0.0,
    "miniature": calculate_shift(64),
    "FLUX.1-dev": calculate_shift(4096),
}.items():
    moved = [shift_by_odds(sigma, mu) for sigma in (0.25, 0.5, 0.75)]
    assert np.allclose(moved, scheduler.time_shift(mu, np.array([0.25, 0.5, 0.75])))
    print(
        f"{name:10} mu {mu:.4f}: 0.25, 0.5, 0.75 become",
        ", ".join(f"{sigma:.4f}" for sigma in moved),
    )

# %%
show(
    plots.shift_curves(
        {"no shift": 0.0, "miniature": calculate_shift(64), "FLUX.1-dev": calculate_shift(4096)}
    ),
    alt="Noise level after the shift against before. Left: curves that bulge upwards, more for a"
    " larger μ."
    " Right: on logarithmic odds, parallel lines.",
)

# %% [markdown]
# *What to see*: on the left the curve bulges towards 1. On the right the same curves on axes that are even in the
# logarithm of the odds: straight and parallel. There the shift adds μ, no more. So two shifts in a row are one shift by
# the sum. We shall use that below.
#
# ### The whole schedule


# %% tags=["nbval-check-output"]
def noise_levels(steps, mu):
    """All levels of a run, [steps + 1], as the pipeline chooses them."""
    scheduler.set_timesteps(sigmas=default_sigmas(steps), mu=mu)
    return scheduler.sigmas


for anatomy in (mini, FLUX_1_DEV):
    sigmas = noise_levels(28, calculate_shift(anatomy.tokens))
    assert sigmas.shape == (29,)
    above = [int((sigmas > level).sum()) for level in (0.9, 0.5)]
    print(
        f"{anatomy.name:10} {anatomy.tokens:4} tokens: {above[0]} of 28 levels above 0.9,"
        f" {above[1]} above 0.5"
    )
    print(
        "           starts with",
        [round(sigma, 4) for sigma in sigmas[:4].tolist()],
        "ends with",
        round(sigmas[-2].item(), 4),
        "and 0",
    )

# %% [markdown]
# Without a shift it would be 14 above 0.5.
#
# ### schnell
#
# FLUX.1-schnell has the same network, trained further to jump: a few steps are enough for it. Its scheduler has no
# dynamic shift, and its fixed shift is 1, which changes nothing.

# %% tags=["nbval-check-output"]
from flux_lab.config import FLUX_SCHNELL_SCHEDULER
from flux_lab.scheduler import FlowMatchEulerDiscreteScheduler

schnell = FlowMatchEulerDiscreteScheduler(FLUX_SCHNELL_SCHEDULER)
schnell.set_timesteps(sigmas=default_sigmas(4))
print("schnell, 4 steps          ", schnell.sigmas.tolist())
print(
    "FLUX.1-dev's, if it took 4",
    [round(sigma, 4) for sigma in noise_levels(4, calculate_shift(4096)).tolist()],
)
assert schnell.sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]

# %%
show(
    plots.schedules(
        {
            "FLUX.1-dev": noise_levels(28, calculate_shift(4096)),
            "miniature": noise_levels(28, calculate_shift(64)),
            "no shift": noise_levels(28, 0.0),
            "schnell": schnell.sigmas,
        }
    ),
    alt="Four schedules. Left: noise level against steps taken. Right: one tick for each level;"
    " FLUX.1-dev's crowd near 1.",
)

# %% [markdown]
# *What to see*: every schedule starts at 1 and ends at 0. On the right, each tick is a level. FLUX.1-dev's ticks crowd
# near the noise, and its last step jumps over a wide gap down to 0.
#
# A schedule alone makes no fast model. The miniature has a sister, `load_mini("schnell")`: the same 57 blocks without the
# guidance MLP, trained to do in one step what dev does in several. Three prompts, each from the same noise:

# %%
sister = flux_lab.load_mini("schnell")
sister.set_progress_bar_config(disable=True)
prompts = [
    "a green cone on grass",
    "a small blue cube behind a large red sphere",
    "a shiny yellow cylinder on sand",
]
few = {}
for name, drawer, steps in (
    ("dev, 28 steps", pipe, 28),
    ("dev, 4 steps", pipe, 4),
    ("schnell, 4 steps", sister, 4),
):
    seeds = [seeded(index) for index in range(len(prompts))]
    few[name] = drawer(prompts, num_inference_steps=steps, generator=seeds).images
show(
    plots.small_grid(few, [textwrap.fill(prompt, 22) for prompt in prompts], cell=1.3),
    alt="Three prompts, three rows: dev in 28 steps, dev in 4 steps, schnell in 4 steps.",
)

# %% [markdown]
# *What to see*: the same noise leads to similar pictures, not to the same: what the prompt leaves open, a floor say,
# can come out otherwise. In a world as simple as this one, dev itself gets far in four steps, so schnell has little
# to gain: compare sizes, edges and shadows. What it has lost is a knob. It was taught with guidance 3.5, and no scale
# that you give it changes anything.
#
# ## The real code
#
# First μ and the evenly spaced levels. Then the shift, and the function that puts everything together.

# %%
source(calculate_shift, docstring=False)

# %%
source(scheduler.time_shift, docstring=False)

# %%
source(scheduler.set_timesteps, docstring=False)

# %% [markdown]
# Read it from below: a 0 is appended; timesteps are 1000 times the sigmas; the levels are shifted, by μ or by the fixed
# `shift`. The arithmetic is NumPy's in `float64` or `float32`; only the result is a tensor. `_stretch_to_terminal` serves
# other models; FLUX.1's configuration leaves it off:

# %%
config_table("scheduler", mini)

# %% [markdown]
# `shift` is 3 in the file, and unused: with `use_dynamic_shifting` μ takes its place. The step:

# %%
source(scheduler.step, docstring=False)

# %% [markdown]
# Three things to notice. The sum is taken in `float32`, as upstream, and the result is rounded to the model's `dtype`
# again: in bf16 a very small step is lost all the same. The scheduler keeps count itself, in `step_index`. And
# `stochastic_sampling`, off in FLUX.1, is another way to step: jump to the predicted picture, then add fresh noise of
# the next level.
#
# The forward process is there too. `diffusers` calls it `scale_noise`; in older schedulers it is `add_noise`.

# %%
source(scheduler.scale_noise, docstring=False)

# %% [markdown]
# ### What `scale_noise` is for: start from a picture
#
# In training, it makes the mixtures. In sampling, it lets you start half-way: mix *your* picture with noise of some
# level, and walk down from there. This is **image to image**. `strength` says how much of the walk is walked.

# %%
WISH = "a large shiny green sphere to the left of a small yellow cube on a wooden floor"
steps, drawn = 14, {}
for strength in (0.2, 0.4, 0.6, 0.9):
    start = int(max(steps - steps * strength, 0))  # the first step that is taken, as in diffusers
    noise_levels(steps, calculate_shift(mini.tokens))
    mixture = scheduler.scale_noise(x0, scheduler.timesteps[start : start + 1], noise)
    image = pipe(WISH, latents=mixture, sigmas=default_sigmas(steps)[start:]).images[0]
    drawn[f"strength {strength}:\nfrom step {start} of {steps}"] = image
show(
    plots.small_grid(
        {"": [to_pil(rendered(128)), *drawn.values()]}, ["the picture", *drawn], cell=1.6
    ),
    alt="A picture and four images made from it with strength 0.2, 0.4, 0.6 and 0.9 and a prompt"
    " with other colours.",
)

# %% [markdown]
# *What to see*: the prompt asks for other colours. With a small strength the walk starts at a low noise level, and
# the picture is mostly kept. With a large one the colours are those of the prompt, and what stays is what the prompt
# asks for as well.
#
# ## Shapes
#
# The schedule is one list of numbers for all pictures of a run. A step changes no shape.

# %% tags=["nbval-check-output"]
for anatomy in (mini, FLUX_1_DEV):
    noise_levels(28, calculate_shift(anatomy.tokens))
    tokens = torch.zeros(anatomy.shapes()["tokens"])
    moved = scheduler.step(tokens, scheduler.timesteps[0], tokens)
    assert scheduler.sigmas.shape == (29,)
    assert scheduler.timesteps.shape == (28,)
    assert moved.shape == (1, anatomy.tokens, 64)
    print(
        f"{anatomy.name:10} sigmas [29], timesteps [28], latents before and after a step"
        f" {list(moved.shape)}"
    )

# %% [markdown]
# Two mistakes, and what is said about them: the velocity of another picture size, and the number of the step in place of
# the timestep.

# %% tags=["nbval-check-output"]
from flux_lab.shapes import ShapeError

noise_levels(28, calculate_shift(64))
for timestep, sample in ((scheduler.timesteps[0], torch.zeros(1, 4096, 64)), (0, noise)):
    try:
        scheduler.step(velocity, timestep, sample)
    except (ShapeError, ValueError) as error:
        print(type(error).__name__, error, "", sep="\n")

# %% [markdown]
# ## Trust, then verify
#
# The reference is `FlowMatchEulerDiscreteScheduler` of `diffusers`. Three configurations: the miniature's file, which is
# FLUX.1-dev's, schnell's, and a fixed shift of 3. For each, every number of steps from 1 to 60 and five sizes.

# %% tags=["nbval-check-output"]
import diffusers

settings = {"FLUX.1-dev": mini.scheduler.to_dict(), "schnell": FLUX_SCHNELL_SCHEDULER.to_dict()}
settings["fixed shift 3"] = settings["schnell"] | {"shift": 3.0}
for name, values in settings.items():
    ours = FlowMatchEulerDiscreteScheduler.from_config(values)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(values)
    largest = 0.0
    for steps in range(1, 61):
        for tokens in (64, 256, 1024, 4096, 16384):
            for each in (ours, theirs):
                each.set_timesteps(sigmas=default_sigmas(steps), mu=calculate_shift(tokens))
            largest = max(largest, (ours.sigmas - theirs.sigmas).abs().max().item())
    print(f"{name:13} largest difference of 300 schedules: {largest}")
    assert largest == 0

# %% tags=["nbval-check-output"]
ours = FlowMatchEulerDiscreteScheduler.from_config(settings["FLUX.1-dev"])
theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(settings["FLUX.1-dev"])
for dtype in (torch.float32, torch.bfloat16):
    for each in (ours, theirs):
        each.set_timesteps(sigmas=default_sigmas(28), mu=calculate_shift(64))
    x, y, largest = noise.to(dtype), noise.to(dtype), 0.0
    for step, timestep in enumerate(ours.timesteps):
        velocity = torch.randn(noise.shape, generator=seeded(step)).to(dtype)
        x = ours.step(velocity, timestep, x)
        y = theirs.step(velocity, timestep, y, return_dict=False)[0]
        largest = max(largest, (x - y).abs().max().item())
    mixed = [each.scale_noise(x0, each.timesteps[14:15], noise) for each in (ours, theirs)]
    print(
        f"{dtype!s:15} largest difference: 28 steps {largest}, scale_noise"
        f" {(mixed[0] - mixed[1]).abs().max().item()}"
    )
    assert largest == 0
    assert torch.equal(*mixed)

# %% [markdown]
# Zero, not "nearly zero": the same operations in the same order. One oddity of the reference is reproduced with it. With
# a fixed shift, and a *number of steps* in place of levels, the shift is applied twice, because the end points are read
# off a table that is shifted already. Pipelines avoid it by passing levels:

# %% tags=["nbval-check-output"]
for scheme in (FlowMatchEulerDiscreteScheduler, diffusers.FlowMatchEulerDiscreteScheduler):
    fixed = scheme.from_config(settings["fixed shift 3"])
    for given in ({"sigmas": default_sigmas(4)}, {"num_inference_steps": 4}):
        fixed.set_timesteps(**given)
        print(
            f"{scheme.__module__.split('.')[0]:9} {next(iter(given)):19}",
            [round(sigma, 3) for sigma in fixed.sigmas.tolist()],
        )

# %% [markdown]
# ## Turn the knob
#
# **The schedule for any number of steps and any size.** Watch the ticks on the right.


# %%
def draw_schedule(steps=20, pixels=1024):
    tokens = (pixels // 16) ** 2
    mu = calculate_shift(tokens)
    return plots.schedules(
        {
            f"{pixels} px, μ = {mu:.2f}": noise_levels(steps, mu),
            "not shifted": noise_levels(steps, 0.0),
        },
    )


explore(
    draw_schedule,
    steps=(1, 50),
    pixels=(64, 2048, 64),
    alt="The schedule of 20 steps for 1024 pixels beside the one without a shift: its levels crowd"
    " near 1.",
)

# %% [markdown]
# **The walk in the world of two pictures.** How many steps does it take until every path ends at +1 or −1? Where does
# each path go with one step?


# %%
def draw_walk(steps=4, mu=0.0):
    sigmas = noise_levels(steps, mu)
    title = f"steps: {steps}, μ = {mu}"
    return plots.level_paths(
        {title: (sigmas, toy_walk(starts, sigmas))}, ylabel="the number x", by_end=True
    )


explore(
    draw_walk,
    steps=(1, 30),
    mu=(-2.0, 3.0, 0.5),
    alt="12 paths in 4 straight pieces each.",
)

# %% [markdown]
# With one step every path ends at 0: the mean of the two pictures, which is no picture of this world. That is the blur
# that one step of the miniature gives (lesson 00).
#
# **The miniature with any number of steps and any μ.** Shifts add up, so we take off the μ that the pipeline will add.

# %%
OWN = calculate_shift(mini.tokens)


def levels_for(steps, mu):
    """Levels that become those of `mu` when the pipeline has shifted them by its own."""
    return scheduler.time_shift(mu - OWN, default_sigmas(steps))


def draw_image(steps=6, mu=0.5, seed=0):
    image = pipe(PROMPT, sigmas=levels_for(steps, mu), generator=seeded(seed)).images[0]
    return plots.gallery([image], [f"steps: {steps}, μ = {mu}, seed {seed}"])


explore(
    draw_image,
    steps=(1, 28),
    mu=(-2.0, 4.0, 0.5),
    seed=(0, 20),
    alt="The miniature's image after 6 steps with μ = 0.5.",
)

# %% [markdown]
# ## How many steps?
#
# The more steps, the closer the walk keeps to the curve. We take a walk of 48 steps as the truth and measure how far
# shorter ones end from it: the length of the difference over the length of the result.


# %%
def end_of_walk(steps, mu):
    sigmas = levels_for(steps, mu)
    with flux_lab.shapes.checks(enabled=False):  # many passes: they are faster without
        return pipe(PROMPT, latents=noise, sigmas=sigmas, output_type="latent").images


truth = end_of_walk(48, OWN)


def error(steps, mu):
    return ((end_of_walk(steps, mu) - truth).norm() / truth.norm()).item()


# %%
counts = [1, 2, 4, 8]
errors = {f"shifted, μ = {OWN:.2f}": {}, "not shifted, μ = 0": {}}
for name, mu in zip(errors, (OWN, 0.0), strict=True):
    errors[name] = {steps: error(steps, mu) for steps in counts}
    print(f"{name:20}", "  ".join(f"{steps}: {value:.3f}" for steps, value in errors[name].items()))
show(
    plots.convergence(errors),
    alt="Error against steps on logarithmic axes, with and without the shift; it falls with the"
    " number of steps.",
)

# %% [markdown]
# *What to see*: for small steps, Euler's method halves its error when the steps are doubled; that is the dotted slope.
# Compare the two curves with each other and with it. It is one prompt and one seed: another may put them closer together
# or further apart. Each further step costs as much as the first, and gains less: that is why 28 steps, or 50, are enough.
#
# ## Break it
#
# **Predict first**: which schedule ends closest to the truth with only 6 steps, the one without a shift, FLUX.1's, or one
# with a shift that is much too strong?

# %%
trials = {
    "not shifted, μ = 0": 0.0,
    f"as trained, μ = {OWN:.2f}": OWN,
    "FLUX.1-dev's, μ = 1.15": 1.15,
    "too strong, μ = 3": 3.0,
}
ends = {name: end_of_walk(6, mu) for name, mu in trials.items()}
for name, end in ends.items():
    print(f"{name:22} error {((end - truth).norm() / truth.norm()).item():.3f}")
shown = pipe.decode(torch.cat([*ends.values(), truth]), 128, 128)
show(
    plots.small_grid({"": shown}, [*ends, "48 steps"], cell=1.6),
    alt="Five images of one prompt: 6 steps without shift, with the usual shift, with stronger"
    " ones, and 48 steps.",
)

# %% [markdown]
# *What to see*: a shift that is too strong spends almost every step near pure noise, and then has to jump from a high
# level down to 0 in one step. What it jumps to is a mean of pictures, so surfaces, edges and small things suffer. The
# miniature's own μ is small. What would be left out in FLUX.1-dev?

# %% tags=["nbval-check-output"]
for tokens, pixels in ((64, 128), (4096, 1024)):
    with_shift, without = noise_levels(28, calculate_shift(tokens)), noise_levels(28, 0.0)
    counts_above = [int((levels > 0.7).sum()) for levels in (with_shift, without)]
    print(
        f"{pixels:4} pixels: {counts_above[0]} of 28 steps start above sigma = 0.7; without the"
        f" shift {counts_above[1]}"
    )

# %% [markdown]
# At 1024 × 1024 pixels nearly twice as many steps go to high noise, where a large picture's layout is decided. Without
# the shift the layout gets few, coarse steps.
#
# ## Common misreadings
#
# **"The Euler step is `noise_pred + (sigma_next - sigma) * latents`."** This line is printed in some write-ups. Latents
# and velocity are swapped. The step of the reference, read from its source:

# %%
import inspect

step_code = inspect.getsource(diffusers.FlowMatchEulerDiscreteScheduler.step)
print(
    *(
        line.strip()
        for line in step_code.splitlines()
        if "dt = sigma_next" in line or "sample + dt" in line
    ),
    sep="\n",
)

# %% [markdown]
# `model_output` is the velocity. What would the swapped line draw? In the world of two pictures every walk must end at
# +1 or −1. And the miniature:


# %%
def swapped_step(velocity, timestep, sample, **_):
    sigma = timestep / 1000
    following = scheduler.sigmas[(scheduler.timesteps == timestep).nonzero().item() + 1]
    return velocity + (following - sigma) * sample


with instruments.seams.replaced(scheduler, "step", swapped_step):
    wrong = pipe(PROMPT, latents=noise, num_inference_steps=8).images[0]
right = pipe(PROMPT, latents=noise, num_inference_steps=8).images[0]
show(
    plots.small_grid(
        {"": [right, wrong]}, ["latents + Δσ · velocity", "velocity + Δσ · latents"], cell=1.8
    ),
    alt="Left: the scene that the prompt asks for. Right: the swapped line gives no picture.",
)

# %%
x = starts
for sigma, sigma_next in pairwise(fine[::10]):
    x = toy_velocity(x, sigma) + (sigma_next - sigma) * x
for name, ends in {"right step": toy_walk(starts, fine[::10])[-1], "swapped": x}.items():
    print(
        f"{name:10} mean distance to the nearest picture, +1 or -1:"
        f" {(ends.abs() - 1).abs().mean():.3f}"
    )

# %% [markdown]
# **"`max_shift` is 1.16."** A function with this default is printed in some write-ups. The reference's default, ours, and
# the configuration file:

# %%
from diffusers.pipelines.flux.pipeline_flux import calculate_shift as reference_shift

# %% tags=["nbval-check-output"]
for function in (reference_shift, calculate_shift):
    print(
        f"{function.__module__:40} max_shift ="
        f" {inspect.signature(function).parameters['max_shift'].default}"
    )
print(f"{'scheduler_config.json':40} max_shift = {mini.scheduler.max_shift}")
assert reference_shift(1024) == calculate_shift(1024)

# %% [markdown]
# **"The scheduler adjusts the learning rate."** A *learning-rate scheduler* belongs to training: it changes how far an
# optimizer moves the weights. This scheduler moves *latents*. It has no weights, and no weight changes in a run:

# %% tags=["nbval-check-output"]
before = sum(parameter.double().abs().sum() for parameter in pipe.transformer.parameters())
pipe(PROMPT, num_inference_steps=2, output_type="latent")
after = sum(parameter.double().abs().sum() for parameter in pipe.transformer.parameters())
print("is a torch module, with parameters:", isinstance(scheduler, torch.nn.Module))
print(
    "is one of PyTorch's learning-rate schedulers:",
    isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler),
)
print(
    "fields about a learning rate:",
    [name for name in mini.scheduler.to_dict() if "lr" in name or "rate" in name],
)
print("a run changed a weight:", bool(before != after))

# %% [markdown]
# **"Timesteps are whole numbers that count the steps."** They never count the steps. In older models they are whole
# numbers, rows of a table of 1000 levels (lesson 12). Here a timestep is a level, $1000\, \sigma$, and after the shift
# it is hardly ever whole. The 0 at the end is no timestep: the network is never asked there.

# %% tags=["nbval-check-output"]
noise_levels(4, calculate_shift(4096))
print("timesteps", [round(timestep, 2) for timestep in scheduler.timesteps.tolist()])

# %% [markdown]
# ## Your turn
#
# ### Exercise 1: μ (easy, 5 minutes)
#
# Write the line through (256 tokens, 0.5) and (4096 tokens, 1.15). `tokens` is a tensor with the number of image tokens
# of several pictures; give a tensor of the same shape.


# %% tags=["exercise"]
def mu_for(tokens):
    """mu for each number of image tokens."""
    raise NotImplementedError


# %%
from flux_lab.exercises import check

check("mu_for", mu_for)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# How much does μ grow from one fixed point to the other, and over how many tokens?
#
# </details>
# <details><summary>Hint 2</summary>
#
# Start at (256, 0.5): how many tokens beyond 256 are there?
#
# </details>
# <details><summary>Hint 3</summary>
#
# The line goes on beyond its fixed points: 64 tokens give 0.4675.
#
# </details>


# %% tags=["solution"]
def mu_for(tokens):
    """mu for each number of image tokens."""
    return 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)


# %% [markdown]
# ### Exercise 2: the shift (medium, 10 minutes)
#
# Move noise levels by μ. `sigmas` is a tensor of any shape with numbers in 0 … 1, 0 not among them; `mu` is a number.


# %% tags=["exercise"]
def shift_sigmas(sigmas, mu):
    """Noise levels moved towards 1 by mu."""
    raise NotImplementedError


# %%
check("shift_sigmas", shift_sigmas)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The odds are σ / (1 − σ). They are multiplied by $e^\mu$.
#
# </details>
# <details><summary>Hint 2</summary>
#
# At σ = 1 the odds are infinite. The form $e^\mu / (e^\mu + (1/\sigma - 1))$ avoids that.
#
# </details>
# <details><summary>Hint 3</summary>
#
# `math.exp(mu)` is $e^\mu$. Test yourself: μ = 0 must change nothing.
#
# </details>


# %% tags=["solution"]
def shift_sigmas(sigmas, mu):
    """Noise levels moved towards 1 by mu."""
    strength = np.exp(mu)
    return strength / (strength + (1 / sigmas - 1))


# %% [markdown]
# ### Exercise 3: all levels of a run (medium, 15 minutes)
#
# For a number of steps and a μ, give all noise levels from 1 down to 0, shifted: a `float32` tensor `[steps + 1]`.


# %% tags=["exercise"]
def noise_levels_of(steps, mu):
    """All noise levels of a run, float32 [steps + 1], from 1 down to 0."""
    raise NotImplementedError


# %%
check("noise_levels", noise_levels_of)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Begin with `torch.linspace(1, 1 / steps, steps)`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Shift these, as in exercise 2. The 0 comes afterwards: 1/0 has no value.
#
# </details>
# <details><summary>Hint 3</summary>
#
# `torch.cat([sigmas, torch.zeros(1)])` appends the 0.
#
# </details>


# %% tags=["solution"]
def noise_levels_of(steps, mu):
    """All noise levels of a run, float32 [steps + 1], from 1 down to 0."""
    sigmas = torch.linspace(1, 1 / steps, steps)
    strength = np.exp(mu)
    return torch.cat([strength / (strength + (1 / sigmas - 1)), torch.zeros(1)])


# %% [markdown]
# ### Exercise 4: mix pictures with noise (medium, 10 minutes)
#
# Write the forward process for a batch. `picture` and `noise` have one shape, with any number of axes, the first of
# them the batch. `sigma` has the shape `[batch]`: a level for each picture.


# %% tags=["exercise"]
def add_noise(picture, noise, sigma):
    """The mixture of each picture with its noise, at its own noise level."""
    raise NotImplementedError


# %%
check("add_noise", add_noise)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Sigma is the share of the noise. What is left for the picture?
#
# </details>
# <details><summary>Hint 2</summary>
#
# `sigma` must get as many axes as `picture`, all but the first of size 1. Then PyTorch repeats it along them.
#
# </details>
# <details><summary>Hint 3</summary>
#
# `sigma.reshape(len(sigma), *[1] * (picture.ndim - 1))`.
#
# </details>


# %% tags=["solution"]
def add_noise(picture, noise, sigma):
    """The mixture of each picture with its noise, at its own noise level."""
    sigma = sigma.reshape(len(sigma), *[1] * (picture.ndim - 1))
    return (1 - sigma) * picture + sigma * noise


# %% [markdown]
# ## Recap
#
# 1. Training mixes picture and noise along a straight line, $x_\sigma = (1 - \sigma) x_0 + \sigma n$. Sampling follows
#    the mean velocity, and that path bends.
# 2. The levels of a run are $1, \dots, 1/N$, shifted, then 0. A timestep is $1000\,\sigma$.
# 3. μ is the line through (256 tokens, 0.5) and (4096 tokens, 1.15). The shift multiplies the odds of noise against
#    picture by $e^\mu$: larger pictures take more steps near the noise. schnell does not shift.
# 4. A step is $x + (\sigma_\text{next} - \sigma)\, v$. More steps, smaller error; it halves when they double.
# 5. Levels, steps and mixtures equal those of `diffusers` to the last bit.
#
# **Next**: lesson 10 picks up the noise levels, `sigmas` of shape `[29]`, and walks: the whole loop, with everything that
# steers it.
