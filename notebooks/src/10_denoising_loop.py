# %% [markdown]
# # 10 · The denoising loop
#
# After this lesson you can
#
# - name the six steps of the pipeline and write its loop yourself;
# - read any moment of a run: latents, velocity, predicted picture, and what is settled by then;
# - tell `guidance_scale` from `true_cfg_scale`, say what each costs, and measure who wins when two prompts disagree.
#
# **Time**: half a minute to run, 60 minutes to study. **You need**: lessons 00 and 09.

# %%
import inspect
import re
import time
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

import flux_lab
from flux_lab import instruments
from flux_lab.instruments import FLUX_1_DEV, ablate, explore, plots, show, source, trace
from flux_lab.latents import pack_latents, unpack_latents
from flux_lab.scheduler import default_sigmas

torch.set_grad_enabled(False)  # nothing is trained here
pipe = flux_lab.load_mini()
pipe.set_progress_bar_config(disable=True)
mini = instruments.anatomy_of(pipe)  # its sizes

# %% [markdown]
# ## You are here
#
# In the loop between transformer and scheduler. Everything before it is done once, and so is everything behind it. The
# loop runs once for every noise level, so nearly all of the time is spent here.

# %%
show(
    plots.pipeline_map("denoising_loop", shapes=(mini, FLUX_1_DEV)),
    alt="Map of the pipeline with the scheduler lit and the transformer outlined: tokens of shape"
    " [1, 64, 64] go round between them; in FLUX.1-dev [1, 4096, 64].",
)

# %% [markdown]
# ## The idea
#
# The latents $x$ stand at a noise level $\sigma$, between 1 (only noise) and 0 (only picture). The network says the
# **velocity** $v$: the direction from the picture to the noise. The scheduler takes one **Euler step**, a straight
# piece of the way, to the next lower level:
#
# $$v = \text{network}(x, \sigma, \text{text}, \text{guidance}), \qquad x \leftarrow x + (\sigma_\text{next} - \sigma)\, v.$$
#
# $x$ and $v$ are `[batch, 64, 64]` (FLUX.1-dev: `[batch, 4096, 64]`), σ is one number. If $v$ stayed the same all the
# way, the walk would end at the **predicted picture**
#
# $$x_0 = x - \sigma\, v.$$
#
# The network has to be asked again only because its answer changes on the way. Around the loop stand five more steps.
# The pipeline numbers them in its comments; we read them out of the source:

# %% tags=["nbval-check-output"]
for line in inspect.getsource(flux_lab.FluxPipeline).splitlines():
    if re.match(r" +# \d\. ", line):
        print(line.strip(" #"))

# %% [markdown]
# ### Before the loop: steps 1 to 4
#
# `encode_prompt` is step 2: T5 gives one vector for each token, CLIP one for the whole prompt. Step 3 draws the noise
# and packs it. Step 4 chooses the noise levels. What of all this changes inside the loop? We record what goes into the
# network in the first two steps and compare.

# %% tags=["nbval-check-output"]
PROMPT = "a large red sphere to the left of a small blue cube on a grassy floor"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


with trace(pipe, only=("step */input/*", "step */conditioning/*", "step */rope/cos")) as inputs:
    pipe(PROMPT, num_inference_steps=2, generator=seeded())
for name in inputs.names("step 00/*"):
    again = inputs[name.replace("step 00", "step 01")]
    print(
        f"{name.removeprefix('step 00/'):28}"
        f" {'the same' if torch.equal(inputs[name], again) else 'changes'}"
    )

# %% [markdown]
# Only the latents and the noise level change. Text, guidance and positions are the same in every step, so they are
# computed before the loop, or could be (lesson 14 gains time from that).
#
# ### Step 5: the loop, and its states
#
# `pipe.steps` is the loop as a **generator**, a function that hands out a value and goes on when asked. Each state
# tells what happened in one step.

# %%
STEPS = 14  # 28 are the default; half as many do for looking
states = list(pipe.steps(PROMPT, num_inference_steps=STEPS, generator=seeded()))
chosen = [states[index] for index in (0, 1, 3, 5, 7, 10, 13)]
rows = {
    "latents,\ndecoded": [state.image("latents") for state in chosen],
    "predicted\npicture x0": [state.image("x0") for state in chosen],
}
levels = [f"σ {state.sigma:.2f} → {state.sigma_next:.2f}" for state in chosen]
titles = [f"step {state.index + 1}\n{level}" for state, level in zip(chosen, levels, strict=True)]
show(
    plots.small_grid(rows, titles),
    alt="Seven of 14 steps: the latents, decoded, turn from noise to a picture; the predicted"
    " picture goes from a blur to the same.",
)

# %% [markdown]
# *What to see*: above, noise gives way to the picture. Below, each step's prediction of the end. The upper row lags
# behind: at σ = 0.5 it still is half noise.
#
# Both formulas, checked at every step:

# %% tags=["nbval-check-output"]
for before, after in pairwise(states):
    stepped = before.latents + (after.sigma_next - after.sigma) * after.velocity
    assert torch.allclose(after.latents, stepped, atol=1e-5)
    assert torch.allclose(after.x0, before.latents - after.sigma * after.velocity, atol=1e-5)
assert torch.allclose(states[-1].latents, states[-1].x0, atol=1e-4)  # the last step goes to sigma 0
print(
    f"{len(states)} states, each with latents, velocity and x0 of shape {list(states[0].x0.shape)}"
)
print(f"in FLUX.1-dev {list(FLUX_1_DEV.shapes()['tokens'])}")

# %% [markdown]
# Now step by step. The middle panel shows the velocity: its strength at every place, the root of the mean square of its
# 16 channels. Dark places move little, light ones much.


# %%
def at_step(step=5):
    state = states[step - 1]
    velocity = plots.strength_map(state.velocity, 128, 128, highest=3.0)
    panels = [state.image("latents"), velocity, state.image("x0")]
    titles = [
        f"latents at σ = {state.sigma_next:.3f}",
        "strength of the velocity, 0 to 3",
        f"x0, predicted at σ = {state.sigma:.3f}",
    ]
    return plots.small_grid({"": panels}, titles, cell=2.1)


explore(
    at_step,
    step=(1, STEPS),
    alt="Step 5 of 14: the latents with noise, a map of the velocity's strength, and the predicted"
    " picture.",
)

# %% [markdown]
# *What to see*: at the first steps the velocity is the noise minus the predicted picture, so the map shows specks
# from the one and areas of the other. Later the scene shows in it too: places whose latents are large are far from
# the noise.
#
# ### Three strengths
#
# How large are the three, over the whole run? **RMS** is the root of the mean square over all 4,096 numbers.

# %%
steps = range(1, len(states) + 1)
names = {"latents": "latents", "velocity": "velocity", "x0": "predicted picture x0"}
strengths = {
    said: [getattr(state, name).square().mean().sqrt() for state in states]
    for name, said in names.items()
}
show(
    plots.lines(steps, strengths, xlabel="step", ylabel="RMS"),
    alt="RMS of latents, velocity and predicted picture over 14 steps: the latents dip in the"
    " middle.",
)

# %% [markdown]
# *What to see*: noise and finished latents both have an RMS of about 1 (that is what the VAE's scaling is for, lesson
# 11). Half and half of two independent things of strength 1 has $\sqrt{0.5^2 + 0.5^2} = 0.71$, so the latents are
# weakest in the middle. The first prediction is a guess at many possible pictures at once. Their plain average would
# be pale; guidance, below, pushes it far beyond the average, so it is even stronger than a finished picture.
#
# ### When is what settled?
#
# Is the path straight? We measure the angle between each velocity and the next: 0° is straight on. And we split every
# predicted picture into the **coarse** part, averages over 16 × 16 pixels, and the **fine** rest, and ask how far each
# still is from the final one.

# %%
angles = [
    F.cosine_similarity(before.velocity.flatten(), after.velocity.flatten(), dim=0)
    .clamp(-1, 1)
    .acos()
    .rad2deg()
    for before, after in pairwise(states)
]
show(
    plots.lines(
        steps[1:],
        {"between this velocity and the one before": angles},
        xlabel="step",
        ylabel="angle, degrees",
    ),
    alt="Angle between successive velocities at each of the steps 2 to 14.",
)
print(f"largest turn: {max(angles):.1f} degrees, at step {int(np.argmax(angles)) + 2}")

# %%
predictions = pipe.decode(torch.cat([state.x0 for state in states]), 128, 128, output_type="pt")
coarse = F.interpolate(F.avg_pool2d(predictions, 16), scale_factor=16)
parts = {"coarse: averages of 16 x 16 pixels": coarse, "fine: the rest": predictions - coarse}
left = {name: (part - part[-1]).abs().mean(dim=(1, 2, 3)) for name, part in parts.items()}
left = {name: distance / distance[0] for name, distance in left.items()}
show(
    plots.lines(
        steps, left, xlabel="step", ylabel="distance to the final picture\n(1 = that of step 1)"
    ),
    alt="Distance of the predicted picture to the final one over 14 steps, for the coarse and the"
    " fine part.",
)
for name, distance in left.items():
    print(f"{name:36} half of the way is done at step {int((distance < 0.5).nonzero()[0]) + 1}")

# %% [markdown]
# *What to see*: compare the two curves. The coarse part is ahead: high noise hides fine detail, so the early steps
# decide above all about floor, places and large shapes. A turn of the path means that the network has changed its
# mind.
#
# ### Seeds
#
# The noise of step 3 comes from a random number generator, a `torch.Generator` (another thing than the Python generator
# above). It is started with a number, the **seed**. From here on we draw many pictures, in four steps each, which is
# enough for comparisons. Shape checks are off: in so small a model they take a quarter of the time.

# %%
SEEDS = (0, 1, 2)


def drawn(prompt=PROMPT, seeds=SEEDS, steps=4, **options):
    """Pictures, one for each seed; of several prompts one after the other."""
    prompts = 1 if isinstance(prompt, str) else len(prompt)
    options["generator"] = [seeded(seed) for seed in seeds] * prompts
    options["num_images_per_prompt"] = len(seeds)
    with flux_lab.shapes.checks(enabled=False):
        return pipe(prompt, num_inference_steps=steps, **options).images


sphere, cube = "a large red sphere on a grassy floor", "a large white cube on a dark floor"
by_seed = [f"seed {seed}" for seed in SEEDS]
rows = {"red sphere,\ngrass": drawn(sphere), "white cube,\ndark": drawn(cube)}
show(
    plots.small_grid(rows, by_seed, cell=1.28),
    alt="Two prompts in two rows, three seeds in three columns.",
)

# %% [markdown]
# *What to see*: go down a column. The same noise with other words: does the object stand in a similar place? The seed
# carries no words, but it decides what the words leave open, and sometimes more: a model that is not perfect draws an
# object too many.
#
# With a *list* of random generators, one for each picture, a picture does not depend on its neighbours in the batch.
# With *one* generator for the whole batch, the noise of the second picture is drawn after the first one's, and has no
# seed of its own:

# %% tags=["nbval-check-output"]
from flux_lab.latents import prepare_noise

single = [prepare_noise((1, 16, 16, 16), seeded(seed)) for seed in (0, 1)]
listed = prepare_noise((2, 16, 16, 16), [seeded(0), seeded(1)])
shared = prepare_noise((2, 16, 16, 16), seeded(0))
for place in (0, 1):
    print(
        f"picture {place}: a list gives the noise of seed {place}:"
        f" {torch.equal(listed[place], single[place][0])},",
        f"one generator with seed 0 does: {torch.equal(shared[place], single[place][0])}",
    )

# %% [markdown]
# ### Guidance: an input
#
# **Guidance** means: follow the text more than the training pictures did. FLUX.1-dev takes the strength as a number. It
# goes the way of the noise level: times 1000, 256 sines and cosines, two linear layers, and is added to the
# conditioning vector (lesson 05). One pass through the network, whatever the number.

# %%
guided = {scale: drawn(guidance_scale=scale) for scale in (1.0, 3.0, 6.0)}
rows = {f"guidance_scale\n{scale:g}": images for scale, images in guided.items()}
show(
    plots.small_grid(rows, by_seed, cell=1.28),
    alt="Guidance scales 1, 3 and 6 in rows, three seeds in columns.",
)

# %% [markdown]
# *What to see*: go down a column. Do objects come out clearer, colours stronger? And is something lost on the way, such
# as variety or soft shadows? Training covered scales from 1 to 6 here; outside that range the network has to guess.
#
# ### True CFG: a second pass
#
# Where did the network learn this? From **classifier-free guidance**, CFG, which needs no guidance input, but two
# passes in every step: one with the prompt, one with a **negative prompt**, often the empty one. The step then uses
#
# $$v = v_\text{neg} + s\,(v_\text{pos} - v_\text{neg}).$$
#
# $s$ is `true_cfg_scale`. At $s = 1$ this is $v_\text{pos}$; at $s > 1$ it goes beyond it, away from the negative. In
# training, called **distillation**, the network was shown the result of both passes and the number $s$, and learned to
# give it in one. So the two should look alike. True CFG, with the guidance input at 1, on the same seeds:

# %%
two_passes = drawn(guidance_scale=1.0, true_cfg_scale=3.0, negative_prompt="")
rows = {
    "scale 1": guided[1.0],
    "3, as an input": guided[3.0],
    "3, true CFG,\ntwo passes": two_passes,
}
show(
    plots.small_grid(rows, by_seed, cell=1.28),
    alt="Three rows of three seeds: scale 1, scale 3 as an input, scale 3 as true CFG.",
)


# %% [markdown]
# *What to see*: compare the two lower rows. They may agree but for small things in these seeds and differ in another:
# a small difference in the first step can tip a scene over. So pictures are a bad measure here. A fair one compares
# what the network *says*, at the same latents: those in front of two steps of the walk of 14 above.


# %%
def says(step, **options):
    """The velocity in front of a step of the walk above."""
    before = {"latents": states[step - 2].latents, "sigmas": default_sigmas(STEPS)[step - 1 :]}
    return next(pipe.steps(PROMPT, **before, **options)).velocity


for step in (2, 8):
    alone, as_input = says(step, guidance_scale=1.0), says(step, guidance_scale=3.0)
    true_cfg = says(step, guidance_scale=1.0, true_cfg_scale=3.0, negative_prompt="")
    moved, apart = ((v - true_cfg).norm() / alone.norm() for v in (alone, as_input))
    print(
        f"step {step:2}, σ = {states[step - 1].sigma:.2f}: true CFG changes the velocity by"
        f" {moved:4.0%}, the input's is {apart:4.0%} from there"
    )

# %% [markdown]
# Where the second number is the smaller one, the input has learned that much of what true CFG does. At 0 % it would be
# true CFG, for half the price.
#
# What does it cost? We count the passes with a hook, and time them.


# %%
def cost(**options):
    """Passes through the network in one step, and seconds."""
    passes = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, result: passes.append(result)
    )
    started = time.perf_counter()
    pipe(PROMPT, num_inference_steps=1, output_type="latent", generator=seeded(), **options)
    hook.remove()
    return passes, time.perf_counter() - started


# %% tags=["nbval-check-output"]
ways = {
    "guidance_scale=3.5": {"guidance_scale": 3.5},
    "guidance_scale=1.0": {"guidance_scale": 1.0},
    "true_cfg_scale=4, negative prompt": {"true_cfg_scale": 4.0, "negative_prompt": "a dark floor"},
    "true_cfg_scale=1, negative prompt": {"true_cfg_scale": 1.0, "negative_prompt": "a dark floor"},
}
measured = {name: cost(**options) for name, options in ways.items()}
for name, (passes, _) in measured.items():
    print(f"{name:35} {len(passes)} passes in a step")

# %%
for name, (_, seconds) in measured.items():
    print(f"{name:35} {seconds:.2f} seconds")

# %% [markdown]
# Two passes, nearly twice the time, as far as one measurement tells: next to the network, everything else in a step is
# little. And the formula, checked
# on the passes of the first step, which the hook has kept; the negative one comes second:

# %%
asked = ways["true_cfg_scale=4, negative prompt"]
state = next(pipe.steps(PROMPT, num_inference_steps=1, generator=seeded(), **asked))
positive, negative = measured["true_cfg_scale=4, negative prompt"][0][:2]
by_hand = negative + 4.0 * (positive - negative)
assert torch.allclose(state.velocity, by_hand, atol=1e-5)
print(f"largest difference: {(state.velocity - by_hand).abs().max():.1e}")

# %% [markdown]
# A negative prompt can do what the guidance input cannot: push away from something that you name. The prompt here says
# nothing of the floor:

# %%
free = {"prompt": "a small blue cube", "seeds": (0, 1), "guidance_scale": 1.0}
rows = {
    "no negative\nprompt": drawn(**free),
    "not: a dark\nfloor": drawn(**free, true_cfg_scale=3.0, negative_prompt="a dark floor"),
}
show(
    plots.small_grid(rows, [f"seed {seed}" for seed in free["seeds"]], cell=1.28),
    alt="A small blue cube from two seeds, without a negative prompt and with the negative prompt"
    " 'a dark floor'.",
)

# %% [markdown]
# *What to see*: which floors were left free to chance in the upper row, and what happened to the dark one in the
# lower row.
#
# ### prompt against prompt_2
#
# `prompt` is read by CLIP, which gives the network one vector; `prompt_2` by T5, which gives it one for each token. If
# `prompt_2` is left out, both read the same. What if they disagree? We give one wish to one encoder and another wish to
# the other, three seeds each, and measure instead of judging by eye: the mean colour of each picture, on the line
# between the two wishes. 0 is the average of the pictures where both encoders read the first wish, 1 that where both
# read the second.


# %%
PAIRS = {"both: 0": (0, 0), "CLIP: 0, T5: 1": (0, 1), "CLIP: 1, T5: 0": (1, 0), "both: 1": (1, 1)}


def conflict(wishes, seeds=(0, 1, 2)):
    """Pictures of the four pairings of two wishes, and their mean colours, [seeds, 3]."""
    clip, t5 = ([wishes[which] for which in side] for side in zip(*PAIRS.values(), strict=True))
    images = drawn(clip, seeds, prompt_2=t5, output_type="pt").split(len(seeds))
    pictures = dict(zip(PAIRS, images, strict=True))
    return pictures, {name: each.mean(dim=(2, 3)) for name, each in pictures.items()}


def way(colors):
    """How far each picture has gone from the first wish, 0, to the second, 1."""
    start = colors["both: 0"].mean(dim=0)
    line = colors["both: 1"].mean(dim=0) - start
    return {name: (color - start) @ line / line.square().sum() for name, color in colors.items()}


# %%
GRASSY, DARK = "a red sphere on a grassy floor", "a red sphere on a dark floor"
WISHES = {
    "floor": (GRASSY, DARK),
    "colour": ("a large red sphere on a gray floor", "a large blue sphere on a gray floor"),
}
pictures, shares = {}, {}
for what, wishes in WISHES.items():
    pictures[what], colors = conflict(wishes)
    shares[what] = way(colors)
    by_t5, by_clip = (shares[what][name].mean() for name in ("CLIP: 0, T5: 1", "CLIP: 1, T5: 0"))
    t5 = (by_t5 + 1 - by_clip) / 2
    print(f"{what:6} the picture follows T5 by {t5:4.0%}, CLIP by {1 - t5:4.0%}")

# %%
show(
    plots.seed_dots(shares["floor"], "0 = as both read grassy, 1 = as both read dark"),
    alt="Four groups of three dots, one for each seed: the picture's colour between grassy and dark,"
    " for each pairing of prompts.",
)
show(
    plots.seed_dots(shares["colour"], "0 = as both read red, 1 = as both read blue"),
    alt="Four groups of three dots, one for each seed: the picture's colour between red and blue,"
    " for each pairing of prompts.",
)

# %%
rows = {}
for what, images in pictures.items():
    for name in ("CLIP: 0, T5: 1", "CLIP: 1, T5: 0"):
        rows[f"{what}\n{name}"] = pipe.image_processor.postprocess(2 * images[name] - 1)
show(
    plots.small_grid(rows, [f"seed {seed}" for seed in range(3)], cell=1.28),
    alt="Images of the conflict: two rows in which the prompts disagree about the floor, two in"
    " which they disagree about the colour.",
)

# %% [markdown]
# *What to see*: in the rows of a conflict, whose wish is it? Dots near those of "both: 1" mean that the encoder which
# read the second wish has won. Dots of one group close together mean that it is not left to chance.
#
# Who wins is learned, not built in. CLIP's vector reaches every token through the modulation of every block, T5's
# vectors through attention. In a small world one vector may have room for a whole caption, but whether the network
# listens to it is another matter. Shares a little below 0 % or above 100 % only say that seeds differ. FLUX.1-dev's
# CLIP gives 768 numbers for any prompt and reads at most 77 tokens; its T5 gives 512 vectors of 4096 numbers, so the
# details of a long prompt can only come through T5. Do not carry a result over from one model to another: measure.
#
# ### Stepping in: callback_on_step_end
#
# A function given as `callback_on_step_end` is called after every step with the pipeline, the step's index, its
# timestep (1000 σ) and the tensors that were asked for. It returns a dict of those that it changed. Here we turn the
# latents round, left to right, after one step:


# %%
def flip_after(step):
    def callback(pipe, index, timestep, tensors):
        if index != step:
            return {}
        latents = unpack_latents(tensors["latents"], height=128, width=128)
        return {"latents": pack_latents(latents.flip(-1))}

    return callback


# %%
six = {"prompt": PROMPT, "num_inference_steps": 6}
walk = list(pipe.steps(**six, generator=seeded()))
whole = walk[-1].image("latents")
flipped = [drawn(seeds=[0], steps=6, callback_on_step_end=flip_after(step))[0] for step in (0, 4)]
titles = ["not flipped", "after step 1", "after step 5"]
show(
    plots.small_grid({"": [whole, *flipped]}, titles, cell=1.45),
    alt="The image without a flip, and flipped left to right after steps 1 and 5 of 6.",
)

# %% [markdown]
# *What to see*: the prompt says *left*. After an early flip the network still has time to make a scene of it; compare
# it with the words, for something may be lost. After a late flip things stay where the flip put them, and edges may
# be notched: the flip moves the latents, but does not mirror what each says about its own 8 × 8 pixels. The sun of
# this world always stands on the left.
#
# ## The real code
#
# The loop with everything around it. Find the numbered comments, the line where the second pass is mixed in, and
# `yield`.

# %%
source(pipe.steps, docstring=False)

# %% [markdown]
# Calling the pipeline runs the generator to its end, calls your callback, and decodes:

# %%
source(type(pipe).__call__, docstring=False)

# %% [markdown]
# And when is there a second pass? Only when both are there, a scale above 1 and a negative prompt:

# %%
source(flux_lab.pipeline._use_negative)

# %% [markdown]
# ## Shapes
#
# What goes into the network in each step and what comes out, for both models. FLUX.1-dev runs on the `meta` device,
# without numbers.

# %% tags=["nbval-check-output"]
table = instruments.side_by_side(mini, FLUX_1_DEV, only=("input/*", "conditioning*", "velocity"))
print(table)
assert states[0].velocity.shape == mini.shapes()["velocity"] == (1, 64, 64)
assert FLUX_1_DEV.shapes()["velocity"] == (1, 4096, 64)

# %% [markdown]
# `latents=` lets you give the noise yourself. It must be packed. Two wrong ways:

# %% tags=["nbval-check-output"]
from flux_lab.shapes import ShapeError

for wrong in (torch.zeros(1, 16, 16, 16), torch.zeros(1, 60, 64)):
    try:
        pipe(PROMPT, latents=wrong)
    except (ShapeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}\n")

# %% [markdown]
# ## Trust, then verify
#
# The reference runs the same loop on the same weights: with guidance as an input, and with everything at once, true
# CFG, a negative prompt and a second prompt. We compare the latents at the end, before they are rounded to colours.

# %%
import diffusers
import transformers

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()
reference = diffusers.FluxPipeline.from_pretrained(
    flux_lab.data_dir() / "flux-mini", dtype=torch.float32
)
reference.set_progress_bar_config(disable=True)
everything = {
    "prompt_2": GRASSY,
    "negative_prompt": "a cone",
    "negative_prompt_2": "a gray floor",
    "true_cfg_scale": 2.0,
}
# The reference does not read its own sizes from the checkpoint.
own_size = {"height": 128, "width": 128, "max_sequence_length": 32}

# %%
for name, options in {"guidance as an input": {}, "everything at once": everything}.items():
    same = {"num_inference_steps": 2, "guidance_scale": 2.5, "output_type": "latent", **options}
    ours = pipe(PROMPT, **same, generator=seeded()).images
    theirs = reference(PROMPT, **same, **own_size, generator=seeded()).images
    difference = (ours - theirs).abs().max().item()
    print(f"{name:22} largest difference {difference:.1e}")
    assert difference < 1e-3

# %% [markdown]
# ## Turn the knob
#
# Two prompts, two scales, one seed. Leave `prompt_2` empty and both encoders read the first.


# %%
def draw(
    prompt="a red cube on a grassy floor",
    prompt_2="",
    guidance=2.0,
    true_cfg=2.0,
    negative="a dark floor",
    seed=0,
):
    options = {"guidance_scale": guidance, "true_cfg_scale": true_cfg, "negative_prompt": negative}
    images = drawn(prompt, [seed], steps=8, prompt_2=prompt_2, **options)
    return plots.gallery(images, [f"guidance {guidance:g}, true CFG {true_cfg:g}, seed {seed}"])


# %%
explore(
    draw,
    prompt=str,
    prompt_2=str,
    guidance=(1.0, 6.0, 0.5),
    true_cfg=(1.0, 6.0, 0.5),
    negative=str,
    seed=(0, 50),
    alt="An image of a red cube on a grassy floor.",
)

# %% [markdown]
# ## Break it
#
# We change the prompt while the loop is running: grass down to some noise level, a dark floor from there on; and in a
# second run red, then blue. `ablate` swaps the text that the network is given. **Predict first**: down to which noise
# level is a change of mind still obeyed? The floor's, the colour's? Will a late change give half of each? We use four
# steps whose levels lie close together at the beginning.

# %%
LEVELS = [1.0, 0.95, 0.85, 0.6]
TIMES = [0, 1, 2, 3, 4]  # steps with the old prompt


def changing(old, new):
    """Pictures whose prompt changes after each number of steps: all new to all old."""
    pictures = []
    for step in TIMES:
        with ablate(pipe, swap_prompt=(step, new)):
            pictures.append(drawn(old, seeds=[0], sigmas=LEVELS, output_type="pt"))
    return torch.cat(pictures)


mixed = {what: changing(*wishes) for what, wishes in WISHES.items()}
changes_at = pipe.scheduler.sigmas.tolist()

# %%
rows = {what: pipe.image_processor.postprocess(2 * images - 1) for what, images in mixed.items()}
show(
    plots.small_grid(rows, [f"new from\nσ = {sigma:.2f}" for sigma in changes_at], cell=1.28),
    alt="Two rows of five images: the prompt changes from grass to a dark floor, and from red to"
    " blue, at five noise levels from 1 to 0.",
)

# %%
obeyed = {}
for what, images in mixed.items():
    line = images[0] - images[-1]
    obeyed[what] = [((image - images[-1]) * line).sum() / line.square().sum() for image in images]
    last = min(sigma for sigma, share in zip(changes_at, obeyed[what], strict=True) if share > 0.5)
    print(f"{what:6} the latest change that is obeyed by more than half: at σ = {last:.2f}")
show(
    plots.lines(
        changes_at, obeyed, "σ where the prompt changes", "share of the way\nto the new picture"
    ),
    alt="Share of the way to the new prompt's picture against the noise level at which the prompt"
    " changes, for floor and colour: from 1 at σ = 1 down to 0.",
)

# %% [markdown]
# *What to see*: read from the right, σ = 1, where the new prompt holds from the beginning, to the left, σ = 0, where the old
# one holds throughout. Where a curve falls, its subject is decided. What is settled cannot be talked out of it: compare
# the coarse curve above.
#
# **Predict**: what comes out if the network is told the wrong noise level in every step, σ = 1, while the latents get
# cleaner and cleaner?


# %%
def always_pure_noise(module, args, kwargs):
    return args, kwargs | {"timestep": torch.ones_like(kwargs["timestep"])}


hook = pipe.transformer.register_forward_pre_hook(always_pure_noise, with_kwargs=True)
misled = list(pipe.steps(**six, generator=seeded()))
hook.remove()

# %%
titles = ["told the truth", "told σ = 1: step 1", "told σ = 1: the end"]
show(
    plots.small_grid({"": [whole, misled[0].image(), misled[-1].image()]}, titles, cell=1.5),
    alt="The image with the right noise levels, and the first and last prediction when the network"
    " is told σ = 1 all the time.",
)

# %% [markdown]
# *What to see*: the first step is right, because there σ *is* 1. After it the network is told that all is noise while
# part is already picture: compare grain and edges at the end. The noise level is not a detail: it tells the network
# what to look for.
#
# ## Common misreadings
#
# **"guidance_scale means two passes in every step."** Not in FLUX.1-dev: there it is an input of the network, and the
# passes were counted above. The second pass is `true_cfg_scale`, with a negative prompt. And FLUX.1-schnell has neither
# by default: its network has no guidance input at all, and its pipeline is called without a negative prompt.

# %% tags=["nbval-check-output"]
import dataclasses

from flux_lab.config import FLUX_SCHNELL

schnell = dataclasses.replace(FLUX_1_DEV, name="FLUX.1-schnell", transformer=FLUX_SCHNELL)
for anatomy in (mini, FLUX_1_DEV, schnell):
    embedder = getattr(
        instruments.on_meta("transformer", anatomy).time_text_embed, "guidance_embedder", None
    )
    count = 0 if embedder is None else sum(parameter.numel() for parameter in embedder.parameters())
    print(f"{anatomy.name:15} parameters that read the guidance scale: {count:,}")

# %% [markdown]
# **"guidance_scale = 1 (or 0) switches guidance off and saves time."** It is a number like any other: the same passes.
# 1 says "as the training pictures were", 0 is outside of what was trained. Neither is skipped:

# %%
first_velocity = {
    scale: next(iter(pipe.steps(PROMPT, guidance_scale=scale, generator=seeded()))).velocity
    for scale in (0.0, 1.0, 3.5)
}
for scale in (0.0, 3.5):
    print(
        f"first velocity, guidance {scale} against 1.0: mean difference"
        f" {(first_velocity[scale] - first_velocity[1.0]).abs().mean():.4f}"
    )

# %% [markdown]
# **"A negative prompt works by itself."** Without `true_cfg_scale` above 1 it is not even encoded:

# %% tags=["nbval-check-output"]
plain = pipe(PROMPT, num_inference_steps=2, generator=seeded(), output_type="latent").images
ignored = pipe(
    PROMPT,
    negative_prompt="a red sphere",
    num_inference_steps=2,
    generator=seeded(),
    output_type="latent",
).images
assert torch.equal(plain, ignored)
print("with and without a negative prompt, true_cfg_scale 1: every number is the same")

# %% [markdown]
# **"x0 at step 4 is the picture that 4 steps would give."** No: $x_0$ is a straight jump from where step 4 stands in
# a walk of 6. A walk of 4 steps has other noise levels and is made of four other straight pieces. The pictures can
# still look alike where the way hardly bends:

# %%
of_four = list(pipe.steps(PROMPT, num_inference_steps=4, generator=seeded()))
three = [walk[3].image(), of_four[-1].image(), whole]
show(
    plots.small_grid({"": three}, ["x0 at step 4 of 6", "4 steps of 4", "6 steps of 6"], cell=1.5),
    alt="The predicted picture at step 4 of 6, the result of 4 steps, and the result of 6 steps.",
)
first, second = (np.float32(image) for image in three[:2])
print(f"mean difference of the first two: {np.abs(first - second).mean():.1f} of 255")
print(f"σ at step 4: {walk[3].sigma:.3f} of six, {of_four[3].sigma:.3f} of four")

# %% [markdown]
# ## Your turn
#
# ### Exercise 1: the predicted picture (easy, 5 minutes)
#
# `latents` stand at noise level `sigma`, where the network said `velocity`. Give the picture that it aims at.


# %% tags=["exercise"]
def predicted_picture(latents, velocity, sigma):
    """x0, from the latents at noise level sigma and the velocity there."""
    raise NotImplementedError


# %%
from flux_lab.exercises import check

check("predicted_picture", predicted_picture)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The picture is at σ = 0. How far is that from here, and in which direction?
#
# </details>
# <details><summary>Hint 2</summary>
#
# An Euler step with `sigma_next = 0`.
#
# </details>


# %% tags=["solution"]
def predicted_picture(latents, velocity, sigma):
    """x0, from the latents at noise level sigma and the velocity there."""
    return latents - sigma * velocity


# %% [markdown]
# ### Exercise 2: true CFG (easy, 5 minutes)
#
# Combine the velocities of the two passes.


# %% tags=["exercise"]
def true_cfg(positive, negative, true_cfg_scale):
    """The velocity of both passes together."""
    raise NotImplementedError


# %%
check("true_cfg", true_cfg)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# At scale 1 the result is `positive`, at scale 0 it would be `negative`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Start at `negative` and go `true_cfg_scale` times the way to `positive`.
#
# </details>


# %% tags=["solution"]
def true_cfg(positive, negative, true_cfg_scale):
    """The velocity of both passes together."""
    return negative + true_cfg_scale * (positive - negative)


# %% [markdown]
# ### Exercise 3: what does it cost? (easy, 5 minutes)
#
# How often does FLUX.1-dev's transformer run for one image? `negative_prompt` is a string or None.


# %% tags=["exercise"]
def network_passes(steps, guidance_scale, true_cfg_scale, negative_prompt):
    """Passes through the network for one image, a whole number."""
    raise NotImplementedError


# %%
check("network_passes", network_passes)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Look at `_use_negative` under "The real code".
#
# </details>
# <details><summary>Hint 2</summary>
#
# An empty string is a prompt. `None` is not.
#
# </details>


# %% tags=["solution"]
def network_passes(steps, guidance_scale, true_cfg_scale, negative_prompt):
    """Passes through the network for one image, a whole number."""
    has_second = true_cfg_scale > 1 and negative_prompt is not None
    return 2 * steps if has_second else steps


# %% [markdown]
# ### Exercise 4: the loop (medium, 15 minutes)
#
# `sigmas` are the noise levels, a tensor from high to low that ends with 0. `velocity_at(latents, sigma)` asks the
# network. Walk from the first level to the last and give the latents there.


# %% tags=["exercise"]
def denoise(velocity_at, latents, sigmas):
    """The latents at the last of the noise levels."""
    raise NotImplementedError


# %%
check("denoise", denoise)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# With n + 1 levels there are n steps. `itertools.pairwise(sigmas)` gives each level with the next.
#
# </details>
# <details><summary>Hint 2</summary>
#
# In every step: ask at the level where the latents *are*, then move by `(sigma_next - sigma) * velocity`. Write
# `latents = latents + …`, which makes a new tensor; `latents += …` would change the one that you were given.
#
# </details>


# %% tags=["solution"]
def denoise(velocity_at, latents, sigmas):
    """The latents at the last of the noise levels."""
    for sigma, sigma_next in pairwise(sigmas):
        latents = latents + (sigma_next - sigma) * velocity_at(latents, sigma)
    return latents


# %% [markdown]
# ## Recap
#
# 1. Six steps: check, encode, draw noise, choose the levels, walk, decode. Only latents and noise level change inside
#    the walk.
# 2. Every state holds latents, velocity and $x_0 = x - \sigma v$. What is coarse is settled first; a seed decides what
#    the words leave open.
# 3. `guidance_scale` is a number that FLUX.1-dev's network reads: one pass. `true_cfg_scale` above 1 with a negative
#    prompt is a second pass: twice the time. FLUX.1-schnell has neither by default.
# 4. CLIP reads `prompt`, T5 reads `prompt_2`. When they disagree, measure over several seeds.
# 5. `pipe.steps` and `callback_on_step_end` let you look at every step, and step in.
#
# **Next**: the loop leaves packed latents, `[1, 64, 64]` (FLUX.1-dev: `[1, 4096, 64]`), at σ = 0. Lesson 11 picks them
# up, unpacks them and decodes them to pixels.
