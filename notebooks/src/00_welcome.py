# %% [markdown]
# # 00 · Welcome: one prompt, one image
#
# After this lesson you can
#
# - turn your own words into an image, and name the seven parts that took part in it;
# - read the map of FLUX.1: which tensor goes where, and its shape, in a miniature and in the real FLUX.1-dev;
# - stop the model at any step, look at what it holds, and take a step by hand.
#
# **Time**: half a minute to run, 40 minutes to study. **You need**: Python, the basics of PyTorch, and to have
# heard of attention. You need no graphics card, no network and no account.

# %% [markdown]
# ## How to use the course
#
# FLUX.1 is a model that makes images from text. It was published in 2024 by Black Forest Labs. This course takes it
# apart, in the order in which the data flows, and puts it together again. All code is in the package `flux_lab`; each
# lesson opens one or two of its modules.
#
# The real model, **FLUX.1-dev**, has 12 billion parameters in its main network. Here you work with a **miniature**:
# the same anatomy, 1/32 of the width, trained on pictures of a table top. It draws an image in seconds on a laptop.
# Wherever a size is printed for the miniature, the same size is printed for FLUX.1-dev. How it was trained, what it gets
# right and how often, and what it cannot do stands in its [model card](../data/flux-mini/README.md).
#
# - Run a cell with **Shift+Enter**, everything with *Run → Run All Cells*. Cells may be run again; change them and
#   see what happens.
# - Cells with **sliders** are live in JupyterLab. Elsewhere you see a picture of their starting position.
# - **Exercises** stand at the end. Write your answer in place of `raise NotImplementedError`. The next cell checks it
#   and names the mistake. Hints and solutions are folded up: click on them when you want them.
# - Every lesson compares our code with the reference, Hugging Face's `diffusers` and `transformers`. Trust the
#   comparison, not us.
#
# | lessons | what they take apart |
# |---|---|
# | 00 | the whole, once |
# | 01, 02 | text: tokens, then vectors |
# | 03, 04, 05 | what the network is given: latents as tokens, positions, the noise level |
# | 06, 07, 08 | the network: double-stream blocks, single-stream blocks, all together |
# | 09, 10, 11 | from noise to image: noise levels, the loop, the decoder |
# | 12, 13, 14 | the generation before, the real model in 16 GB, making it fast |

# %%
from itertools import pairwise

import numpy as np
import torch

import flux_lab
from flux_lab import instruments
from flux_lab.instruments import FLUX_1_DEV, config_table, explore, plots, show, source

torch.set_grad_enabled(False)  # nothing is trained here
pipe = flux_lab.load_mini()
pipe.set_progress_bar_config(disable=True)
mini = instruments.anatomy_of(pipe)  # its sizes

# %% [markdown]
# ## You are here
#
# The whole pipeline on one map. Follow it from the upper left, with the arrows, to the image at the lower left. Every
# lesson opens with this map, its own part lit. Nothing is lit now: this lesson walks the whole way once.
#
# A list such as `[1, 64, 64]` is the **shape** of a tensor. The first number is the batch: one image.

# %%
show(
    plots.pipeline_map(shapes=(mini, FLUX_1_DEV)),
    alt="Map of the pipeline: the prompt goes through two tokenizers and two text encoders;"
    " noise is packed into tokens; the transformer and the scheduler form a loop;"
    " the result is unpacked and decoded to an image. Shapes stand on the arrows.",
)

# %% [markdown]
# *What to see*: text enters at the top and in the middle, noise below. They meet in the transformer. The loop at the
# lower right is run once for every step. Only the last arrow carries pixels.
#
# ## One prompt, one image
#
# The miniature knows one small world: one or two objects on a table top. An object is a sphere, cube, cylinder or
# cone; red, orange, yellow, green, teal, blue, purple or white; small or large; matte or shiny. The floor is gray,
# wooden, grassy, sandy or dark. Two objects stand left of, right of, in front of or behind each other.

# %%
PROMPT = "a large shiny red sphere to the left of a small blue cube on a wooden floor"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


image = pipe(PROMPT, generator=seeded()).images[0]
show(plots.gallery([image], ["28 steps, seed 0"]), alt="The miniature's image: " + PROMPT)

# %% [markdown]
# *What to see*: compare it with the words, one by one. Floor and colours come out first in training, shapes last, and
# this miniature was trained for hours, not for weeks: its edges are wobbly, and in some pictures an object is missing or
# one too many. How often each attribute is right was measured; the model card has the table.
#
# A **seed** numbers the noise that the image starts from. Another seed gives another image of the same words. Eight steps
# are enough to see it:

# %%
options = {"num_inference_steps": 8, "num_images_per_prompt": 4}
images = pipe(PROMPT, **options, generator=[seeded(seed) for seed in range(1, 5)]).images
show(
    plots.gallery(images, [f"seed {seed}" for seed in range(1, 5)]),
    alt="Four images of the same prompt from four seeds: the same wooden floor, red and blue"
    " objects in other places.",
)

# %% [markdown]
# ## The idea
#
# Training takes an image and mixes it with noise. An image, encoded, is a tensor $x_0$; the noise $n$ is a tensor of
# the same shape, drawn from a normal distribution. The **noise level** $\sigma$ (sigma) says how much of the mixture
# is noise:
#
# $$x_\sigma = (1 - \sigma)\, x_0 + \sigma\, n, \qquad 0 \le \sigma \le 1.$$
#
# At $\sigma = 1$ there is only noise, at $\sigma = 0$ only the image. Between them $x_\sigma$ moves on a straight
# line. Its direction is the **velocity** $v = n - x_0$. The network is trained to say $v$, given $x_\sigma$, $\sigma$
# and the text. Drawing an image walks the line the other way: start with noise at $\sigma = 1$, ask the network for
# $v$, go a small step, ask again:
#
# $$x \leftarrow x + (\sigma_\text{next} - \sigma)\, v.$$
#
# This is **Euler's method**. All tensors have one shape: `[1, 64, 64]` in the miniature, `[1, 4096, 64]` in
# FLUX.1-dev.
#
# `pipe.steps(...)` is the loop, and hands you its state after every step. Here is a walk of 14 steps:

# %%
states = list(pipe.steps(PROMPT, num_inference_steps=14, generator=seeded()))
chosen = [0, 1, 3, 5, 7, 9, 11, 13]
show(
    plots.film_strip([states[index] for index in chosen]),
    alt="Eight of 14 steps. Upper row: the latents, decoded, turn from noise to the image."
    " Lower row: the picture that each step aims at, blurred at first, then sharper.",
)

# %% [markdown]
# *What to see*: the upper row is what the loop holds, from noise to image. The lower row is $x_0 = x - \sigma v$, the
# image that the network aims at from there. At the first step it has seen nothing but noise and words: it can only
# aim at the average of all images that fit the words, a blur. Places are settled first, then colours, edges last.
# Move the slider to see every step:


# %%
def at_step(step=8):
    state = states[step - 1]
    titles = [f"latents at σ = {state.sigma_next:.3f}", f"x0, aimed at, σ = {state.sigma:.3f}"]
    return plots.gallery([state.image("latents"), state.image("x0")], titles)


explore(
    at_step,
    step=(1, 14),
    alt="Step 8 of 14: in the latents the scene shows through the noise; the picture aimed at is"
    " clear.",
)

# %% [markdown]
# ## What is in a checkpoint
#
# A **checkpoint** is a folder of trained weights. Ours has the layout of the reference library `diffusers`. Its table
# of contents is `model_index.json`:

# %%
folder = flux_lab.data_dir() / "flux-mini"
print((folder / "model_index.json").read_text())
instruments.model_index(folder)

# %% [markdown]
# The seven parts, in the order in which the data flows:
#
# | part | takes | gives |
# |---|---|---|
# | `tokenizer`, `tokenizer_2` | the prompt, a string | ids, whole numbers that stand for pieces of words |
# | `text_encoder` (CLIP) | ids | one vector for the whole prompt, called *pooled* |
# | `text_encoder_2` (T5) | ids | one vector for each token |
# | `transformer` | noisy latents as tokens, both kinds of text vectors, the noise level, the guidance scale | the velocity of each token |
# | `scheduler` | a number of steps | the noise levels; it also takes the Euler steps |
# | `vae` | latents, 8 times smaller than the image | the image |
#
# **Latents** are what the VAE's encoder makes of an image: fewer numbers that still hold the picture. The loop works
# on them. Each part has a `config.json` with its sizes. Read the tables line by line only if you like; you will meet
# every line again.

# %%
config_table("transformer", mini)

# %% [markdown]
# `num_layers` and `num_single_layers` are equal: the miniature has all 57 blocks. Width is 3 heads × 32 = 96 channels
# here, 24 × 128 = 3072 there.

# %%
config_table("vae", mini)

# %% [markdown]
# Four levels, so three halvings: each latent stands for 8 × 8 pixels, in both models.

# %%
config_table("text_encoder", mini)

# %%
config_table("text_encoder_2", mini)

# %% [markdown]
# The miniature's vocabularies are small because its captions need few words. It reads 32 T5 tokens, FLUX.1-dev 512.

# %%
config_table("scheduler", mini)

# %% [markdown]
# The scheduler has no weights, so the two are the same. How many numbers do the other parts hold? We count on
# PyTorch's `meta` device, where a tensor has a shape but no memory.

# %% tags=["nbval-check-output"]
table = instruments.budget(mini, FLUX_1_DEV)
assert instruments.parameter_counts(FLUX_1_DEV)["transformer"] == 11_901_408_320
print(table)

# %%
counts = {anatomy.name: instruments.parameter_counts(anatomy) for anatomy in (mini, FLUX_1_DEV)}
show(
    plots.parameter_bars(counts),
    alt="Parameters of four models, on a logarithmic scale: both transformers are the largest.",
)

# %% [markdown]
# *What to see*: in both, the transformer is the largest part. In FLUX.1-dev the T5 text encoder comes second, with
# 4.8 billion parameters.
#
# ## The same, by hand
#
# Now the six steps of the pipeline, one by one. A small function prints each shape beside that of FLUX.1-dev.


# %% tags=["nbval-check-output"]
def beside(name, tensor):
    assert tuple(tensor.shape) == mini.shapes()[name]
    print(
        f"{name:21} miniature {list(tensor.shape)!s:17} FLUX.1-dev"
        f" {list(FLUX_1_DEV.shapes()[name])}"
    )


t5_ids = pipe.tokenizer_2(PROMPT)
text = pipe.encode_prompt(PROMPT)
beside("t5_ids", t5_ids)
beside("prompt_embeds", text.prompt_embeds)
beside("pooled_prompt_embeds", text.pooled_prompt_embeds)
print(pipe.tokenizer_2.pieces_of(t5_ids[0].tolist()))

# %% [markdown]
# The prompt became 32 tokens: pieces of words, `▁` marks where a word begins, `</s>` ends the text, and `<pad>` fills
# up. T5 turned every token into a vector; CLIP turned the whole prompt into one.
#
# Next the noise: 16 channels. The latents are cut into 2 × 2 patches, and each patch becomes one token of 16 · 2 · 2
# = 64 numbers.

# %% tags=["nbval-check-output"]
from flux_lab.latents import pack_latents, prepare_latent_image_ids, prepare_noise, unpack_latents

noise = prepare_noise(mini.shapes()["latents"], seeded())
x = pack_latents(noise)
img_ids = prepare_latent_image_ids(rows=8, columns=8)
beside("latents", noise)
beside("tokens", x)
beside("position_ids", torch.cat([text.text_ids, img_ids]))

# %%
show(
    plots.latent_channels(noise),
    alt="The 16 channels of the starting latents, 16 by 16 numbers each: noise without structure.",
)

# %% [markdown]
# *What to see*: nothing. This is seed 0, noise without a pattern, and it is all that tells one image of a prompt from
# another.
#
# The noise levels come next. They are not evenly spaced: a picture with more tokens spends more steps at high noise.
# Lesson 09 derives the curve.

# %% tags=["nbval-check-output"]
from flux_lab.scheduler import calculate_shift, default_sigmas

sigmas = {}
for anatomy in (mini, FLUX_1_DEV):
    mu = calculate_shift(anatomy.tokens)
    pipe.scheduler.set_timesteps(sigmas=default_sigmas(28), mu=mu)
    sigmas[anatomy.name] = pipe.scheduler.sigmas
    first = [round(sigma, 4) for sigma in pipe.scheduler.sigmas.tolist()[:4]]
    print(f"{anatomy.name:10} {anatomy.tokens:4} tokens, mu = {mu:.4f}, first sigmas {first}")

# %%
show(
    plots.sigma_curve(sigmas),
    alt="Noise level against steps taken: both fall from 1 to 0; FLUX.1-dev stays high for longer.",
)

# %% [markdown]
# *What to see*: both walks start at 1 and end at 0. FLUX.1-dev, with 64 times as many tokens, stays at high noise for
# longer.
#
# Now ask the network for the velocity, and walk.


# %%
def velocity_at(x, sigma, guidance=3.5):
    return pipe.transformer(
        hidden_states=x,
        encoder_hidden_states=text.prompt_embeds,
        pooled_projections=text.pooled_prompt_embeds,
        timestep=torch.tensor([float(sigma)]),
        guidance=torch.tensor([guidance]),
        img_ids=img_ids,
        txt_ids=text.text_ids,
    )


# %%
schedule = sigmas["miniature"]
for sigma, sigma_next in pairwise(schedule):
    x = x + (sigma_next - sigma) * velocity_at(x, sigma)

# %% [markdown]
# The last two lines are the whole loop. What is left: unpack the tokens, undo the scaling of the latents, decode.

# %%
unpacked = unpack_latents(x, height=128, width=128)
decoded = pipe.vae.decode(unpacked / mini.vae.scaling_factor + mini.vae.shift_factor)
by_hand = pipe.image_processor.postprocess(decoded, output_type="pil")[0]
beside("latents", unpacked)
beside("image", decoded)
show(
    plots.gallery([image, by_hand], ["by the pipeline", "by hand"]),
    alt="The pipeline's image and the one made by hand: they look the same.",
)

# %% [markdown]
# *What to see*: the same image twice. How nearly the same?


# %%
def largest_difference(first, second):
    return int(np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).max())


print("largest difference of a colour value:", largest_difference(image, by_hand), "of 255")
assert largest_difference(image, by_hand) <= 1

# %% [markdown]
# ## The real code
#
# You have just written `FluxPipeline.steps`. Here it is, read from the package as it is now. Find the six numbered
# comments (number 6, the decoder, is in `__call__`), and the two lines of the loop.

# %%
source(pipe.steps, docstring=False)

# %% [markdown]
# What you have not seen yet: checks of the arguments, a second pass for a *negative prompt* (lesson 10), and `yield`,
# which hands out the state. And this is the Euler step, in the scheduler:

# %%
source(pipe.scheduler.step, docstring=False)

# %% [markdown]
# The line that matters is `sample + (sigma_next - sigma) * velocity`. The rest keeps count of the steps, and offers a
# second way to step (lesson 09).
#
# ## Shapes
#
# The signatures above say what shape each tensor must have: `Float[Tensor, "batch tokens patch_channels"]`. This is
# checked at every call. Let us push FLUX.1-dev's own sizes through its network, on the `meta` device: 12 billion
# parameters, no memory, no result but the shape.

# %% tags=["nbval-check-output"]
giant = instruments.on_meta("transformer", FLUX_1_DEV)
sizes = FLUX_1_DEV.shapes()
velocity = giant(
    hidden_states=torch.empty(sizes["tokens"], device="meta"),
    encoder_hidden_states=torch.empty(sizes["prompt_embeds"], device="meta"),
    pooled_projections=torch.empty(sizes["pooled_prompt_embeds"], device="meta"),
    timestep=torch.empty(1, device="meta"),
    guidance=torch.empty(1, device="meta"),
    img_ids=torch.empty(4096, 3, device="meta"),
    txt_ids=torch.empty(512, 3, device="meta"),
)
assert states[0].velocity.shape == (1, 64, 64)
assert velocity.shape == (1, 4096, 64)
print("velocity: miniature", list(states[0].velocity.shape), "FLUX.1-dev", list(velocity.shape))

# %% [markdown]
# And a wrong shape: here we forget to pack the latents. Read the error: which function, which argument, what it
# expected, what came.

# %% tags=["nbval-check-output"]
from flux_lab.shapes import ShapeError

try:
    velocity_at(noise, 1.0)
except ShapeError as error:
    print(error)

# %% [markdown]
# ## Trust, then verify
#
# The reference is `diffusers`. It reads the same folder, and we ask it for the same image. First, what this machine
# has:

# %%
from flux_lab.instruments import doctor

print(doctor.report())

# %% [markdown]
# This is what `flux-lab doctor` prints in a terminal. Paste it into a bug report. Now the reference:

# %%
import diffusers
import transformers

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()
reference = diffusers.FluxPipeline.from_pretrained(folder, dtype=torch.float32)
reference.set_progress_bar_config(disable=True)
own_size = {"height": 128, "width": 128, "max_sequence_length": 32}
theirs = reference(PROMPT, **own_size, num_inference_steps=8, generator=seeded()).images[0]
ours = pipe(PROMPT, num_inference_steps=8, generator=seeded()).images[0]
difference = largest_difference(ours, theirs)
print("largest difference of a colour value:", difference, "of 255")
assert difference <= 1

# %%
show(
    plots.gallery([ours, theirs], ["flux_lab", "diffusers"]),
    alt="The image of flux_lab and that of diffusers from the same weights: they are the same.",
)

# %% [markdown]
# *What to see*: no difference. Two programs that share no code make the same image. Where a colour value differs at all,
# it is by 1 of 255: the same numbers were added in another order, and one was rounded up, the other down.
#
# ## Turn the knob
#
# Your turn to play. Type a prompt and press Enter; move a slider and let go.
#
# - **seed**: other noise, other image.
# - **steps**: 1 is one straight jump. When do the objects become sharp?
# - **guidance**: how strongly the image should follow the words. In FLUX.1-dev it is an *input of the network*,
#   trained with values like these.


# %%
wish = "a small green cone in front of a large purple cylinder on the sand"


def draw(prompt=wish, seed=1, steps=8, guidance=3.5):
    images = pipe(
        prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=seeded(seed),
    ).images
    return plots.gallery(images, [f"seed {seed}, {steps} steps, guidance {guidance}"])


# %%
explore(
    draw,
    prompt=str,
    seed=(0, 50),
    steps=(1, 28),
    guidance=(1.0, 6.0, 0.5),
    alt="An image of " + wish,
)

# %% [markdown]
# ### Outside its world
#
# What if we ask for something that the miniature has never seen, or for nothing? It has no way to say no. Every walk
# ends somewhere:

# %%
strangers = ["a cat riding a bicycle", "a red sphere", "three red spheres", ""]
noises = [seeded(1) for _ in strangers]
images = pipe(strangers, num_inference_steps=8, generator=noises).images
show(
    plots.gallery(images, [prompt or "(empty prompt)" for prompt in strangers]),
    alt="Images of four prompts; only the second describes the miniature's world.",
)

# %% [markdown]
# *What to see*: only "a red sphere" describes its world, which does not mean that it draws it well. For the others
# it draws *something*: a table top with one or two objects, because it has never seen anything else. The empty prompt it
# knows: one caption in ten was left out in training. The real model does the same, in a much larger world.
#
# ## Break it
#
# The starting noise holds no picture: you saw that there is nothing to see in it. **Predict first**: what will you
# get if the walk starts from zeros instead of noise? The same image, a smooth image, or no image? And from noise half
# as strong?

# %%
tokens = pack_latents(noise)
starts = {"noise": tokens, "noise × 0.5": 0.5 * tokens, "zeros": 0 * tokens}
options = {"num_inference_steps": 8, "output_type": "latent"}
ends = pipe([PROMPT] * 3, latents=torch.cat(list(starts.values())), **options).images
for (name, start), end in zip(starts.items(), ends, strict=True):
    print(f"from {name:12} standard deviation: start {start.std():.2f}, end {end.std():.2f}")
show(
    plots.gallery(pipe.decode(ends, 128, 128), list(starts)),
    alt="Three images: from noise, from noise half as strong, and from zeros.",
)

# %% [markdown]
# *What to see*: the words are the same three times: compare floors, places and shapes. From real noise the words
# decide much, the noise only what they leave open. From zeros even a word that was said can be lost. The network
# counts on the noise's strength, too: at $\sigma = 1$ it was only ever shown noise with a standard deviation of 1, so
# nothing promises a good picture from anything else. And zeros decide nothing: with them, every seed ends in the one
# picture on the right.
#
# ## Common misreadings
#
# **"The network predicts the noise."** Half true. It predicts the velocity $v = n - x_0$. At the first step we know
# the noise $n$ exactly:

# %%
first = states[0]
print("largest difference to the noise it started from")
print("    velocity                    ", f"{(first.velocity - tokens).abs().max():.3f}")
print("    velocity + predicted picture", f"{(first.velocity + first.x0 - tokens).abs().max():.3f}")

# %% [markdown]
# The velocity alone is not the noise; velocity plus predicted picture is.
#
# **"A guidance scale means that the network runs twice in every step."** True for older models, not for FLUX.1-dev.
# Count the calls:

# %% tags=["nbval-check-output"]
calls = []
hook = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
pipe(PROMPT, num_inference_steps=2, guidance_scale=3.5)
print("guidance_scale 3.5:", len(calls), "calls in 2 steps")
calls.clear()
pipe(PROMPT, negative_prompt="a dark floor", true_cfg_scale=2.0, num_inference_steps=2)
print("true_cfg_scale 2.0:", len(calls), "calls in 2 steps")
hook.remove()

# %% [markdown]
# In FLUX.1-dev the guidance scale is one more number that goes in. The second pass exists too, under the name
# `true_cfg_scale` (lesson 10).
#
# **"More steps always give a better image."** More steps follow the curve more closely, and for this picture there is
# soon little left to gain:

# %%
counts = [1, 2, 4, 8]
images = [pipe(PROMPT, num_inference_steps=count, generator=seeded()).images[0] for count in counts]
last = np.asarray(image, dtype=float)
for count, each in zip(counts, images, strict=True):
    difference = np.abs(np.asarray(each) - last).mean()
    print(f"steps: {count:2}, mean difference to 28 steps {difference:4.1f} of 255")
show(
    plots.gallery([*images, image], [f"steps: {count}" for count in [*counts, 28]]),
    alt="The same prompt and seed with 1, 2, 4, 8 and 28 steps.",
)

# %% [markdown]
# *What to see*: one step gives the blur that the film strip showed at its left end. From four on it changes little:
# doubling the steps once more buys ever less.
#
# **"The loop works on pixels."** It never sees one. It moves 12 times fewer numbers:

# %% tags=["nbval-check-output"]
for anatomy in (mini, FLUX_1_DEV):
    _, channels, rows, columns = anatomy.shapes()["latents"]
    _, colors, height, width = anatomy.shapes()["image"]
    latents, pixels = channels * rows * columns, colors * height * width
    print(f"{anatomy.name:10} {latents:7,} numbers in the latents, {pixels:9,} in the image")
    assert pixels == 12 * latents

# %% [markdown]
# ## Your turn
#
# ### Exercise 1: how many tokens? (easy, 5 minutes)
#
# The network's work grows with the number of image tokens. Write a function that gives their number for a picture of
# `height` × `width` pixels. Both are multiples of 16.


# %% tags=["exercise"]
def image_tokens(height, width):
    """The number of image tokens of a picture of height x width pixels."""
    raise NotImplementedError


# %%
from flux_lab.exercises import check

check("image_tokens", image_tokens)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The VAE makes every side 8 times smaller.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Then 2 × 2 latents become one token. How many pixels is a token high and wide?
#
# </details>
# <details><summary>Hint 3</summary>
#
# A picture of 128 × 128 pixels has 64 tokens, one of 1024 × 1024 has 4096. The two sides may differ.
#
# </details>


# %% tags=["solution"]
def image_tokens(height, width):
    """The number of image tokens of a picture of height x width pixels."""
    return (height // 16) * (width // 16)


# %% [markdown]
# ### Exercise 2: one Euler step (easy, 10 minutes)
#
# Write the step from the noise level `sigma` to the next lower one, `sigma_next`. Do not change `latents` itself.


# %% tags=["exercise"]
def euler_step(latents, velocity, sigma, sigma_next):
    """The latents at noise level sigma_next."""
    raise NotImplementedError


# %%
check("euler_step", euler_step)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The velocity says how far the latents move when σ grows by 1. By how much does σ change here?
#
# </details>
# <details><summary>Hint 2</summary>
#
# The change is `sigma_next - sigma`. It is negative: you walk from the noise to the image.
#
# </details>
# <details><summary>Hint 3</summary>
#
# If `sigma_next` is 0, you must arrive at `latents - sigma * velocity`.
#
# </details>


# %% tags=["solution"]
def euler_step(latents, velocity, sigma, sigma_next):
    """The latents at noise level sigma_next."""
    return latents + (sigma_next - sigma) * velocity


# %% [markdown]
# ## Recap
#
# 1. Seven parts: two tokenizers, two text encoders, a transformer, a scheduler, a VAE. `model_index.json` names them.
# 2. An image starts as noise of 16 channels, 8 times smaller than the image along each side, packed into tokens of 64
#    numbers.
# 3. In every step the transformer looks at tokens, text, noise level and guidance, and says the velocity: noise minus
#    picture.
# 4. The scheduler moves the tokens by `(sigma_next - sigma) * velocity`. After the last step σ is 0, and the VAE
#    decodes.
# 5. The miniature has FLUX.1-dev's anatomy, 19 + 38 blocks, and gives the same image in `diffusers`.
#
# **Next**: lesson 01 picks up the prompt, a string, and asks how it becomes ids of shape `[1, 77]` for CLIP and `[1,
# 32]` (FLUX.1-dev: `[1, 512]`) for T5.
