# %% [markdown]
# # 12 · Before FLUX: Stable Diffusion 1.5, part by part
#
# After this lesson you can
#
# - say for each part what FLUX.1 changed, and measure the difference: latents, noise, target, network, text, guidance;
# - compute 0.18215 for an autoencoder of your own, choose PNDM's timesteps, and turn a predicted noise into a velocity;
# - follow the skips of a UNet with all their shapes, and disturb them at the place where a ControlNet adds its own.
#
# **Time**: less than a minute to run, 75 minutes to study. **You need**: lessons 00, 09 and 11.

# %%
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

import flux_lab
from flux_lab import instruments, sd15
from flux_lab.image_processor import VaeImageProcessor
from flux_lab.instruments import FLUX_1_DEV, Table, explore, on_meta, plots, show, source, trace
from flux_lab.sd15.config import SD15_DDPM, SD15_PNDM, SD15_UNET, SD15_VAE
from flux_lab.sd15.pipeline import StableDiffusionPipeline, load_sd15
from flux_lab.sd15.unet import UNet2DConditionModel

torch.set_grad_enabled(False)  # nothing is trained here
SD15 = flux_lab.data_dir() / "sd15-mini"  # this lesson's checkpoint
old, new = load_sd15(SD15), flux_lab.load_mini()
new.set_progress_bar_config(disable=True)
mini = instruments.anatomy_of(new)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## You are here
#
# **Stable Diffusion 1.5**, SD 1.5 for short, was published in 2022. Much of what is written about image models, and most
# tools, were made for it. FLUX.1 came two years later. The map is FLUX's, as always:

# %%
show(
    plots.pipeline_map("denoising_loop", shapes=(mini, FLUX_1_DEV)),
    alt="Map of FLUX's pipeline with the transformer and the scheduler lit: the parts that differ most from Stable Diffusion 1.5.",
)

# %% [markdown]
# The outline is the same in SD 1.5: text to vectors, noise to latents in a loop, latents to pixels. Every box differs.
#
# | on the map | SD 1.5 | FLUX.1-dev |
# |---|---|---|
# | text | CLIP: 77 vectors | T5: 512 vectors, and one vector of CLIP |
# | latents | 4 channels, as they are | 16 channels, packed into tokens |
# | noise | 1000 timesteps, weights $\sqrt{a_t}$ and $\sqrt{1 - a_t}$ | levels σ from 0 to 1, weights $1 - \sigma$ and σ |
# | the network says | the noise | the velocity |
# | network | UNet: convolutions, cross attention, skips | 57 blocks of one width, joint attention |
# | guidance | two predictions in every step | one number that goes in |
# | scheduler | PNDM, 50 steps | Euler, 28 steps |
#
# We have working code for both. The **old miniature** has SD 1.5's anatomy at 1/16 of its width. It was trained on the
# same pictures and captions as FLUX's miniature; its [model card](../data/sd15-mini/README.md) says how. All code of the old
# generation is in `flux_lab/sd15/`.


# %% tags=["nbval-check-output"]
def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


with torch.device("meta"):
    giant = UNet2DConditionModel(SD15_UNET).eval().requires_grad_(False)
    giant_vae = flux_lab.autoencoder.AutoencoderKL(SD15_VAE).eval().requires_grad_(False)
flux = [count(on_meta(part, FLUX_1_DEV)) for part in ("transformer", "vae")]
rows = [("network", count(old.unet), count(new.transformer), count(giant), flux[0])]
rows.append(("autoencoder", count(old.vae), count(new.vae), count(giant_vae), flux[1]))
assert count(giant) == 859_520_964
print(Table(["parameters", "old miniature", "FLUX's miniature", "SD 1.5", "FLUX.1-dev"], rows))

# %% [markdown]
# ## The idea
#
# Both generations mix a picture $x_0$ with noise $n$ of the same shape, and train a network to tell the two apart:
#
# $$x = c\, x_0 + s\, n \qquad\qquad \text{SD 1.5: } c^2 + s^2 = 1 \qquad \text{FLUX: } c + s = 1$$
#
# $c$ and $s$ are numbers, $x$, $x_0$ and $n$ are latents: `[1, 4, 16, 16]` in the old miniature, `[1, 4, 64, 64]` in SD
# 1.5. That is most of it. What else differs is *how* the question is put, and *who* is asked. First, the old generation at
# work:

# %%
PROMPT = "a large shiny red sphere to the left of a small blue cube on a wooden floor"
start = torch.randn(1, 4, 16, 16, generator=seeded())
with flux_lab.shapes.checks(enabled=False):  # faster
    states = list(old.steps(PROMPT, num_inference_steps=25, latents=start))
chosen = [0, 6, 12, 18, 25]
show(
    plots.timestep_strip([states[index] for index in chosen]),
    alt="Five of 26 passes of the old miniature. Upper row: the latents, decoded, from noise to a picture of a table top."
    " Lower row: the picture that each step aims at, from a blur to the end.",
)

# %% [markdown]
# *What to see*: the same walk as in lesson 00. Latents above, below them the picture $x_0$ that the network sees in them.
# Time runs down from $t = 961$ to $1$: a **timestep** is a row number in a table of 1000 noise levels.
#
# ## Latents: 4 channels against 16
#
# Both autoencoders make a picture 8 times smaller along each side. What they keep for each of those places differs.

# %% tags=["nbval-check-output"]
configs = {
    "old miniature": old.vae.config,
    "FLUX's miniature": new.vae.config,
    "SD 1.5": SD15_VAE,
    "FLUX.1-dev": FLUX_1_DEV.vae,
}
for name, config in configs.items():
    side = config.sample_size // config.vae_scale_factor
    latents = (config.latent_channels, side, side)
    fewer = 3 * config.sample_size**2 // np.prod(latents)
    print(
        f"{name:17} {config.sample_size:4} pixels a side, latents {latents!s:14} {fewer} times fewer numbers"
    )

# %% [markdown]
# 48 times fewer numbers against 12. What does it cost? We render scenes whose combination of objects was in nobody's
# training, and send them through both and back. A third way is fair in another sense: FLUX's autoencoder gets the
# picture at *half* the size, so that it too has $16 \cdot 8 \cdot 8 = 1024$ numbers, as many as the old one.

# %%
from flux_lab.training.evaluate import sample_scenes
from flux_lab.training.quality import object_masks, psnr, reconstruct
from flux_lab.training.scenes import render

scenes = sample_scenes(12)
images = render(scenes)
x = old.image_processor.preprocess([Image.fromarray(image) for image in images])
decoded, latents = {}, {}
for name, pipe in (("4 channels", old), ("16 channels", new)):
    decoded[name], latents[name] = reconstruct(pipe.vae, images)
small = F.interpolate(x, scale_factor=0.5, mode="area")
back = F.interpolate(new.vae.decode(new.vae.encode(small).mode()), scale_factor=2, mode="bicubic")
decoded["16 channels,\nhalf the size"] = np.stack(
    [np.asarray(image) for image in old.image_processor.postprocess(back)]
)

# %%
numbers = {"4 channels": 1024, "16 channels": 4096, "16 channels,\nhalf the size": 1024}
masks = object_masks(scenes, 128)
for name, pictures in decoded.items():
    whole, inside = psnr(images, pictures).mean(), psnr(images, pictures, masks).mean()
    named = f"{numbers[name]} numbers, {name.replace(chr(10), ' ')}"
    print(f"{named:40} {whole:.1f} dB, inside the objects {inside:.1f} dB")


# %%
def zoomed(array, box):
    return Image.fromarray(array).crop(box).resize((80, 80), Image.Resampling.NEAREST)


def worst_place(first, second, side=40):
    """The square that lost most, as PIL's (left, upper, right, lower)."""
    error = torch.from_numpy(((first.astype(float) - second) ** 2).mean(axis=2))
    row, column = divmod(
        F.avg_pool2d(error[None], side, stride=4).argmax().item(), (128 - side) // 4 + 1
    )
    return 4 * column, 4 * row, 4 * column + side, 4 * row + side


boxes = [worst_place(images[i], decoded["4 channels"][i]) for i in range(4)]
rows = {
    name: [zoomed(each[i], box) for i, box in enumerate(boxes)]
    for name, each in ({"rendered": images} | decoded).items()
}
show(
    plots.small_grid(rows, cell=0.85),
    alt="Crops of four scenes, enlarged: as rendered, through 4 channels, through 16 channels, and through 16 channels at half the size.",
)

# %% [markdown]
# *What to see*: each crop is the square of 40 × 40 pixels where the 4-channel autoencoder loses most. Compare edges and
# small highlights from row to row. Nobody can draw better than their decoder: what is lost here, no UNet brings back. This
# is why FLUX, and before it SD 3, went from 4 channels to 16. The last row says whether that is a matter of the
# number of numbers alone.
#
# ### 0.18215
#
# The loop's noise has standard deviation 1. The latents should be as strong, or a mixture of half and half is none. SD
# 1.5's people measured the deviation of their latents once, and wrote one over it into the configuration. Do the same for
# the old miniature:

# %%
means = latents["4 channels"] / old.vae.config.scaling_factor  # as the encoder gave them
deviation = means.std()
print(
    f"deviation of the latents of {len(x)} scenes: {deviation:.3f}; one over it: {1 / deviation:.4f}"
)
print(f"scaling_factor in the configuration:     {old.vae.config.scaling_factor}")
print(
    f"SD 1.5's scaling_factor {SD15_VAE.scaling_factor}: its latents' deviation was {1 / SD15_VAE.scaling_factor:.2f}"
)
assert abs(old.vae.config.scaling_factor * deviation - 1) < 0.1
show(
    plots.histograms(
        {"as encoded": means, "times the factor": latents["4 channels"]},
        "value of a latent",
        limit=12.0,
    ),
    alt="Density of the latents' numbers as encoded and times the factor; scaled, they are as wide as the standard normal curve.",
)

# %% [markdown]
# *What to see*: after scaling, the numbers are as wide as the dashed curve of the noise. That is all. There is no shift in
# SD 1.5: `shift_factor`, which also moves the mean to 0, came with SD 3, and FLUX has it too.
#
# ### The posterior
#
# The encoder answers with a mean and a log-variance for each of the 4 channels: 8 channels, called **moments**. SD 1.5
# has one more 1 × 1 convolution on each side, the `quant_conv`s, left over from an ancestor that rounded its latents to a
# code book. FLUX dropped them.

# %% tags=["nbval-check-output"]
moments = old.vae.quant_conv(old.vae.encoder(x[:1]))
mean, logvar = moments.chunk(2, dim=1)
first = old.vae.encode(x[:1])
assert torch.allclose(first.mean, mean)
assert torch.allclose(first.std, (0.5 * logvar.clamp(-30, 20)).exp())
assert torch.equal(first.mode(), first.mean)  # the most likely latents: no noise
shape = list(old.vae.quant_conv.weight.shape)
print("old miniature: moments", list(moments.shape), "mean", list(mean.shape), "quant_conv", shape)
moments = new.vae.encoder(x[:1])
print("FLUX's miniature: moments", list(moments.shape), "quant_conv", new.vae.quant_conv)

# %%
drawn = first.sample(seeded())  # mean + deviation * noise
print(
    f"a sample lies {((drawn - mean).std() / mean.std()).item():.2%} of the latents' own deviation beside the mean"
)
for name, z in (("mode", first.mode()), ("sample", drawn)):
    byte = old.image_processor.postprocess(old.vae.decode(z))[0]
    print(f"{name:6} decoded: {psnr(images[:1], np.asarray(byte)[None])[0]:.1f} dB")

# %% [markdown]
# ### Pictures in
#
# An image-to-image run starts from a picture of any size. Each side is floored to a multiple of 8 in SD 1.5, of 16 in
# FLUX, because of the 2 × 2 patches. A photo of 1032 × 1611 pixels:

# %% tags=["nbval-check-output"]
photo = Image.new("RGB", (1032, 1611), "orange")  # PIL: width first
for name, factor in (("SD 1.5", 8), ("FLUX.1", 16)):
    tensor = VaeImageProcessor(vae_scale_factor=factor).preprocess(photo)
    height, width = tensor.shape[2:]
    print(
        f"{name}: 1032 x 1611 becomes {width} x {height}, tensor {list(tensor.shape)}, latents {height // 8} x {width // 8}"
    )
processor = old.image_processor
print("asked for 500 x 770: ", list(processor.preprocess(photo, height=770, width=500).shape))
for value in (0.25, -0.5):
    print(
        f"a tensor of {value:5} becomes {processor.preprocess(torch.full((1, 3, 16, 16), value))[0, 0, 0, 0].item():5}"
    )

# %% [markdown]
# 1611 is floored to 1608; the picture is *resized* to that, not cropped. Numbers in 0 … 1 become −1 … 1; a tensor that
# holds a negative number is taken to be there already.
#
# ## Noise: a table against a line
#
# SD 1.5's forward process has 1000 timesteps. Each adds a little noise of variance $\beta_t$ and keeps the share $1 -
# \beta_t$. After $t$ of them the share $a_t$ is left, the product of all:
#
# $$a_t = \prod_{i \le t} (1 - \beta_i) \qquad\qquad x_t = \sqrt{a_t}\, x_0 + \sqrt{1 - a_t}\, n$$
#
# The squares of both weights add up to 1, so $x_t$ has variance 1 at every $t$. In FLUX the weights themselves do; its
# mixture is weakest in the middle.

# %% tags=["nbval-check-output"]
schedule = old.scheduler
kept = schedule.alphas_cumprod
assert torch.equal(kept, torch.cumprod(1 - schedule.betas, dim=0))
print("   t   weight of picture, noise   SNR        FLUX's sigma with the same SNR")
for t in (0, 200, 400, 600, 800, 999):
    c, s = kept[t] ** 0.5, (1 - kept[t]) ** 0.5
    print(f"{t:4}   {c:.4f}             {s:.4f}  {c**2 / s**2:10.4f}   {s / (c + s):.4f}")
print(f"variance half-way: SD 1.5 {kept[500] + (1 - kept[500]):.2f}, FLUX {0.5**2 + 0.5**2:.2f}")

# %% [markdown]
# **SNR** is the signal-to-noise ratio, the power of the picture over that of the noise, $c^2 / s^2$. It says how much can
# be seen, in either generation. `add_noise` at four timesteps, and FLUX's mixture at σ = t / 1000:

# %%
timesteps = [0, 300, 600, 999]
x0, n = latents["4 channels"][:1], torch.randn(1, 4, 16, 16, generator=seeded())
x0_flux, n_flux = latents["16 channels"][:1], torch.randn(1, 16, 16, 16, generator=seeded())


def decode_new(z):
    return new.decode(flux_lab.latents.pack_latents(z), 128, 128)[0]


rows = {"SD 1.5": [old.decode(schedule.add_noise(x0, n, torch.tensor([t])))[0] for t in timesteps]}
rows["FLUX"] = [decode_new((1 - t / 1000) * x0_flux + t / 1000 * n_flux) for t in timesteps]
show(
    plots.small_grid(rows, [f"t = {t}" for t in timesteps], cell=0.85),
    alt="A scene mixed with noise at four timesteps, decoded, in SD 1.5's way and in FLUX's: SD 1.5's is lost earlier.",
)

# %% [markdown]
# *What to see*: the scene fades in both rows, at other places. Timesteps are names of noise levels, and the two
# generations give the same names to different levels. Now the levels that a walk of 25 steps really visits:

# %%
from flux_lab.scheduler import calculate_shift, default_sigmas
from flux_lab.sd15.pndm import PNDMScheduler


def old_timesteps(steps):
    pndm = PNDMScheduler(SD15_PNDM)
    pndm.set_timesteps(steps)
    return pndm.timesteps.unique().flip(0)


def new_sigmas(steps, tokens):
    new.scheduler.set_timesteps(sigmas=default_sigmas(steps), mu=calculate_shift(tokens))
    return new.scheduler.sigmas[:-1]  # without the 0 where the last step ends


# %%
visited = kept[old_timesteps(25)]
curves = {"SD 1.5": (visited**0.5, (1 - visited) ** 0.5)}
for name, each in (("FLUX's miniature", mini), ("FLUX.1-dev", FLUX_1_DEV)):
    sigmas = new_sigmas(25, each.tokens)
    curves[name] = (1 - sigmas, sigmas)
show(
    plots.signal_to_noise(curves),
    alt="Signal-to-noise ratio against steps taken, logarithmic. FLUX's curves begin without any signal, SD 1.5's begins above zero.",
)

# %% [markdown]
# *What to see*: all walks cross the dashed line, where picture and noise are equally strong. The triangle is FLUX's first
# level: no picture at all. SD 1.5 never gets there. Even at its last timestep a rest is left:

# %% tags=["nbval-check-output"]
print(
    f"weight of the picture at t = 999: {kept[999] ** 0.5:.4f}, where a walk of 50 steps begins, t = 981: {kept[981] ** 0.5:.4f}"
)

# %% [markdown]
# In training the network could always read the picture's mean brightness out of this rest. In drawing it is given noise
# with no rest in it, and believes that the mean is gray. This is why SD 1.5 draws neither very dark nor very bright pictures
# well (Lin et al. 2023). FLUX's σ = 1 is pure noise, in training and in drawing.
#
# ## PNDM: which timesteps, and how far
#
# `set_timesteps` chooses some of the 1000: evenly spaced, counted up from 1 (`steps_offset`).

# %% tags=["nbval-check-output"]
for steps in (50, 25, 10):
    schedule.set_timesteps(steps)
    timesteps = schedule.timesteps.tolist()
    assert len(timesteps) == steps + 1
    print(
        f"{steps} steps: {len(timesteps)} evaluations of the network, {timesteps[:4]} ... {timesteps[-2:]}"
    )

# %%
ticks = {}
for steps in (50, 25, 10):
    schedule.set_timesteps(steps)
    ticks[f"SD 1.5, {steps} steps"] = schedule.timesteps
ticks["FLUX's miniature, 28"] = 1000 * new_sigmas(28, mini.tokens)
ticks["FLUX.1-dev, 28"] = 1000 * new_sigmas(28, FLUX_1_DEV.tokens)
show(
    plots.timestep_ticks(ticks),
    alt="Five rows of lines at the timesteps visited. SD 1.5's are evenly spaced, the second one is drawn twice as thick;"
    " FLUX.1-dev's crowd on the left, near noise.",
)

# %% [markdown]
# *What to see*: the same spacing everywhere, whatever the size of the picture. FLUX.1-dev's levels crowd near noise. The
# thick line is the second timestep. It is visited **twice**, so 50 steps cost 51 evaluations.
#
# Why twice? Euler's method goes on with the slope where it stands. **PNDM** remembers the last slopes and extrapolates, so
# its steps may be longer. Here the slope is the predicted noise. With four of them the weights are:

# %% tags=["nbval-check-output"]
from flux_lab.sd15.pndm import multistep_slope

for known in (1, 2, 3, 4):
    weights = multistep_slope(list(torch.eye(known, dtype=torch.float64)))
    print(
        f"{known} slopes known, oldest first: {[round(weight, 4) for weight in weights.tolist()]}, sum {weights.sum():.1f}"
    )

# %% [markdown]
# At the first step nothing is remembered. So it is taken, looked at from its end, and taken again with the mean of both
# slopes: two evaluations, one step. Now skip steps. The same noise, fewer and fewer evaluations, and beside it **DDPM**,
# the older sampler, which adds new noise after every step:

# %%
from flux_lab.sd15.ddpm import DDPMScheduler

parts = {name: getattr(old, name) for name in ("unet", "vae", "text_encoder", "tokenizer")}
random_walk = StableDiffusionPipeline(scheduler=DDPMScheduler(SD15_DDPM), **parts)
walks = [("PNDM", old, steps) for steps in (50, 10, 5)] + [("DDPM", random_walk, 10)]
ends = {"PNDM\n25 steps": states[-1].latents}  # the walk at the top of this lesson
with flux_lab.shapes.checks(enabled=False):
    for name, pipe, steps in walks:
        options = {"latents": start, "generator": seeded(1), "output_type": "latent"}
        ends[f"{name}\n{steps} steps"] = pipe(PROMPT, num_inference_steps=steps, **options).images

# %%
finest = ends["PNDM\n50 steps"]
for name, z in ends.items():
    apart = ((z - finest).norm() / finest.norm()).item()
    print(f"{name.replace(chr(10), ', '):15} distance to PNDM's 50 steps {apart:.2f}")
order = [f"PNDM\n{steps} steps" for steps in (50, 25, 10, 5)] + ["DDPM\n10 steps"]
show(
    plots.small_grid({"": [old.decode(ends[name])[0] for name in order]}, order, cell=1.0),
    alt="The same prompt and noise: PNDM with 50, 25, 10 and 5 steps, and DDPM with 10.",
)

# %% [markdown]
# *What to see*: nothing in PNDM is random, so fewer steps lead to nearby pictures, as long as they are not too few. DDPM
# draws new noise at every step, so each run ends at a picture of its own. FLUX's Euler steps are as deterministic as
# PNDM, without a memory.
#
# ## Epsilon against velocity
#
# The UNet's answer is $\epsilon$ (epsilon), the noise it sees in $x_t$. With $c = \sqrt{a_t}$ and $s = \sqrt{1 - a_t}$ the
# forward process can be solved for the picture, and then anything else follows:
#
# $$\hat x_0 = \frac{x_t - s\,\epsilon}{c} \qquad v = c\,\epsilon - s\,\hat x_0 \qquad u = \epsilon - \hat x_0$$
#
# $v$ is the target of "v prediction" (Salimans & Ho 2022), $u$ is FLUX's velocity. All have the latents' shape. One call
# of the network, expressed in four ways:

# %%
from flux_lab.training.captions import standard

t = torch.tensor(500)
text = old.encode_prompt(standard(scenes[0]))
x_t = schedule.add_noise(x0, n, t[None])
epsilon = old.unet(x_t, t, text)
c, s = kept[t] ** 0.5, (1 - kept[t]) ** 0.5
picture = (x_t - s * epsilon) / c
v, u = c * epsilon - s * picture, epsilon - picture
again = {
    "epsilon": (x_t - s * epsilon) / c,
    "v": c * x_t - s * v,
    "u, FLUX's velocity": (x_t - s * u) / (c + s),
}
for name, each in again.items():
    print(f"picture from {name:19} differs by {(each - picture).abs().max():.1e}")
    assert torch.allclose(each, picture, atol=1e-4)
assert torch.equal(picture, schedule.predict_original_sample(epsilon, t, x_t))

# %%
looks = {}
for t in (50, 300, 550, 750, 950):
    noisy = schedule.add_noise(x0, n, torch.tensor([t]))
    seen = schedule.predict_original_sample(old.unet(noisy, t, text), t, noisy)
    looks[f"from t = {t}"] = old.decode(seen)[0]
show(
    plots.small_grid({"": list(looks.values())}, list(looks), cell=0.95),
    alt="The picture that the network sees in a scene with more and more noise, in one look: sharp at first, a blur at the end.",
)

# %% [markdown]
# *What to see*: one look at each noise level, no walk. With little noise the picture comes back whole. With much noise the
# network falls back on what the caption says, and on the mean.
#
# So the network's answers are the same up to bookkeeping. Why did FLUX change the target? Look at what an error of the
# network does to the picture. To get from the answer to $\hat x_0$ it is multiplied by a number:

# %% tags=["nbval-check-output"]
print("   t    from epsilon, s / c   from v, s   from u, s / (c + s)")
for t in (1, 250, 500, 750, 981):
    c, s = kept[t] ** 0.5, (1 - kept[t]) ** 0.5
    print(f"{t:4}   {s / c:12.3f}        {s:10.3f}   {s / (c + s):10.3f}")

# %% [markdown]
# Near pure noise an error of epsilon counts more than ten times in the picture; that of a velocity never more than once.
# And a network that says epsilon has little left to say there: at $t = 999$, $x_t$ itself *is* nearly the noise.
#
# The bookkeeping goes further. Divide $x_t$ by $c + s$, and it is a mixture of FLUX's kind, with $\sigma = s / (c + s)$.
# So the old network can walk FLUX's way, with Euler's method:


# %%
def guided(sample, t, text, empty, scale=7.5):
    """The predicted noise with guidance: two predictions, one batch."""
    without, with_prompt = old.unet(torch.cat([sample] * 2), t, torch.cat([empty, text])).chunk(2)
    return without + scale * (with_prompt - without)


def euler_walk(x_t, timesteps, text, empty, scale=7.5):
    """From x_t at the first of `timesteps` to the picture, along FLUX's straight mixtures."""
    cs, ss = kept[timesteps] ** 0.5, (1 - kept[timesteps]) ** 0.5
    sigmas = torch.cat([ss / (cs + ss), torch.zeros(1)])
    x = x_t / (cs[0] + ss[0])
    for i, t in enumerate(timesteps):
        sample = x * (cs[i] + ss[i])
        epsilon = guided(sample, t, text, empty, scale)
        velocity = epsilon - schedule.predict_original_sample(epsilon, t, sample)
        x = x + (sigmas[i + 1] - sigmas[i]) * velocity
    return x


# %%
prompt_text, empty = old.encode_prompt(PROMPT), old.encode_prompt("")
with flux_lab.shapes.checks(enabled=False):
    flux_way = euler_walk(start, old_timesteps(25), prompt_text, empty)
by_pndm = ends["PNDM\n25 steps"]
both = [old.decode(z)[0] for z in (by_pndm, flux_way)]
show(
    plots.small_grid({"": both}, ["PNDM, 25 steps", "Euler, 25 steps"], cell=1.4),
    alt="The picture of PNDM and that of Euler steps along FLUX's straight mixtures, from the same network and noise.",
)
apart = (flux_way - by_pndm).norm() / flux_way.norm()
print(f"distance {apart:.2f} of the latents' length")

# %% [markdown]
# *What to see*: the same path in other coordinates, walked by two methods: what differs is the error of their steps. An
# epsilon network *is* a velocity network. Training tells them apart: which noise levels and which errors it counted.
#
# ## The UNet: narrow in the middle
#
# FLUX's transformer has one width from its first block to its last. A **UNet** goes down and up again: on the way down,
# maps get smaller and have more channels, on the way up the reverse. What each layer on the way down makes is kept, and
# put beside the map of the same size on the way up. These are the **skips**.

# %%
LAYERS = ["conv_in", "*/resnets/?", "*samplers/0"]
SHORT = {"_blocks/": " ", "_block": "", "/resnets/": "."}
SHORT |= {"/downsamplers/0": " half", "/upsamplers/0": " twice"}


def short(name):
    for long, brief in SHORT.items():
        name = name.replace(long, brief)
    return name


def stages_of(unet):
    """What each layer hands on for one picture, in the order of the run."""
    config, device = unet.config, next(unet.parameters()).device
    sample = torch.zeros(1, 4, config.sample_size, config.sample_size, device=device)
    with trace(unet, only=LAYERS) as walk:
        unet(sample, 1, torch.zeros(1, 77, config.cross_attention_dim, device=device))
    return [plots.Stage(short(name), *each.shape[1:3]) for name, each in walk.items()]


# %%
unet_stages = stages_of(giant)
makers = [i for i, stage in enumerate(unet_stages) if stage.name.startswith(("conv_in", "down"))]
takers = [
    i
    for i, stage in enumerate(unet_stages)
    if stage.name.startswith("up") and "twice" not in stage.name
]
width, side = FLUX_1_DEV.transformer.inner_dim, int(FLUX_1_DEV.tokens**0.5)
blocks = [f"double {i:02}" for i in range(19)] + [f"single {i:02}" for i in range(38)]
models = {"SD 1.5": unet_stages, "FLUX.1-dev": [plots.Stage(name, width, side) for name in blocks]}
show(
    plots.depth_profile(models, {"SD 1.5": list(zip(makers, reversed(takers), strict=True))}),
    alt="Above: SD 1.5's layers as bars; maps shrink from 64 to 8 places a side and grow again, channels from 320 to 1280 and back; twelve"
    " brackets join the way down with the way up. Below: FLUX.1-dev's 57 blocks, all with 64 by 64 places and 3072 channels.",
)

# %% [markdown]
# *What to see*: SD 1.5 spends its channels where there are few places, FLUX spends 3072 everywhere. The brackets pair the
# last map made with the first one needed, like brackets in a formula. Without them fine detail would have to pass through
# 8 × 8 places. FLUX has no such bottleneck and needs no skips.
#
# All skips, and what the middle block hands on, with shapes. These are the places where a **ControlNet**, a second network
# that reads a sketch, adds its own **residuals** to a UNet: `down_block_additional_residuals` and
# `mid_block_additional_residual`.


# %% tags=["nbval-check-output"]
def seams_of(unet, sample, t, text):
    """The twelve skips and the middle block's result: what residuals are added to."""
    temb = unet.embed_time(t, sample)
    skips = unet.run_down(sample, temb, text)
    return [*skips, unet.mid_block(skips[-1], temb, text)]


small_seams = seams_of(old.unet, x_t, 500, text)
nothing = torch.zeros(1, 77, 768, device="meta")
large_seams = seams_of(giant, torch.zeros(1, 4, 64, 64, device="meta"), 500, nothing)
names = [stage.name for stage in unet_stages[:12]] + ["mid"]
shapes = [[list(state.shape) for state in seams] for seams in (small_seams, large_seams)]
assert len(small_seams) == len(large_seams) == 13
assert shapes[1][-1] == [1, 1280, 8, 8]
rows = list(zip(names, *shapes, strict=True))
print(Table(["residual", "old miniature", "SD 1.5"], rows))
print("FLUX.1-dev, after each of 57 blocks:", list(FLUX_1_DEV.shapes()["image_stream"]))

# %% [markdown]
# The UNet, unlike FLUX, wants 13 residuals of 6 different shapes. And it copes with odd sizes: the photo above gives latents of
# 201 × 129. Going down rounds up; going up asks each skip for its size.

# %% tags=["nbval-check-output"]
odd = seams_of(giant, torch.zeros(1, 4, 201, 129, device="meta"), 500, nothing)
print("sizes:", list(dict.fromkeys(tuple(each.shape[2:]) for each in odd)))
out = giant(torch.zeros(1, 4, 201, 129, device="meta"), 500, nothing)
assert out.shape == (1, 4, 201, 129)
print("the network's answer:", list(out.shape))

# %% [markdown]
# ### What a residual does
#
# Disturb one seam at a time at $t = 500$ and see how much the predicted noise changes. Three residuals: minus the state
# itself, which *turns it off*; the state itself, which *doubles* it; and noise as strong as the state. All 13 go through
# in one batch.


# %%
def disturbed(make):
    """Change of the predicted noise, relative to its length, when residual number i is make(state i) and all others are 0."""
    residuals = [torch.zeros(13, *state.shape[1:]) for state in small_seams]
    for i, (residual, state) in enumerate(zip(residuals, small_seams, strict=True)):
        residual[i] = make(state[0])
    many = (x_t.expand(13, -1, -1, -1), 500, text.expand(13, -1, -1))
    many = old.unet(*many, residuals[:-1], residuals[-1])
    return ((many - epsilon).flatten(1).norm(dim=1) / epsilon.norm()).tolist()


ways = {"off": lambda state: -state, "doubled": lambda state: state}
ways["noise added"] = lambda state: state.std() * torch.randn(state.shape, generator=seeded(4))
effects = {name: dict(zip(names, disturbed(make), strict=True)) for name, make in ways.items()}

# %%
show(
    plots.seam_bars(effects, "change of the predicted noise\n(1 = its length)"),
    alt="For each of 12 skips and the middle block three bars: how much the predicted noise changes when it is off, doubled, or noisy.",
)
strongest = max(effects["off"], key=effects["off"].get)
change = effects["off"][strongest]
print(
    f"the answer depends most on {strongest}: turned off, it changes by {change:.0%} of its length"
)

# %% [markdown]
# *What to see*: which skips the answer stands on. Noise is fine detail, and only the skips at full size, the first three,
# can carry it to the end. Deep maps say what is where: a change that is small in this measure may be large in the picture.
#
# Now through a whole walk. A residual of $(f - 1)$ times the state *scales* it by $f$. We scale the seams of one size, at every
# step:


# %%
GROUPS = {
    "16 × 16": range(3),
    "8 × 8": range(3, 6),
    "4 × 4, 2 × 2": range(6, 12),
    "middle": range(12, 13),
}


def with_residuals(make):
    """The UNet, with the residuals that `make(states)` gives for its 13 states."""
    forward = old.unet.forward

    def steered(sample, timestep, text):
        *down, mid = make(seams_of(old.unet, sample, timestep, text))
        return forward(sample, timestep, text, down, mid)

    return instruments.seams.replaced(old.unet, "forward", steered)


# %%
def scaled_walk(*factors, steps=10):
    """A picture for each of `factors`, dictionaries group -> factor; all walks are one batch."""
    of_seam, count = torch.ones(len(factors), 13), len(factors)
    for row, chosen in zip(of_seam, factors, strict=True):
        for group, factor in chosen.items():
            row[list(GROUPS[group])] = factor
    more = (of_seam - 1).repeat(2, 1)[..., None, None, None]  # twice: the halves of guidance

    def residuals(states):
        return [more[:, i] * state for i, state in enumerate(states)]

    given = {"latents": start.repeat(count, 1, 1, 1), "num_images_per_prompt": count}
    given["guidance_scale"] = 4.0  # so few steps need a weaker guidance than 7.5
    with flux_lab.shapes.checks(enabled=False), with_residuals(residuals):
        return old(PROMPT, num_inference_steps=steps, **given).images


# %%
sizes = list(GROUPS)[:3]
trials = {"undisturbed": {}} | {
    f"{group}\ntimes {factor}": {group: factor} for group in sizes[:2] for factor in (0.5, 1.5)
}
show(
    plots.small_grid({"": scaled_walk(*trials.values())}, list(trials), cell=1.0),
    alt="Five pictures of one prompt and noise: undisturbed, and with the skips of two sizes at half and one and a half times their"
    " strength.",
)

# %% [markdown]
# *What to see*: which change breaks the picture, and which only alters it. The skips at full size carry the noise that must be named: a
# wrong scale there leaves noise or takes too much. The smaller ones move objects, colours, light. A ControlNet's residuals are
# no constants: a trained copy of the way down computes them from a sketch, at every step, so that the picture follows its
# lines. FLUX's ControlNets do the same to the image tokens behind its blocks, where every residual has one shape.
#
# ## Cross attention against joint attention
#
# In SD 1.5 the image *asks* and the text *is read*: queries come from the map, keys and values from CLIP's 77 vectors. The
# text itself never changes. This is **cross attention**:
#
# $$\text{softmax}\!\left(\frac{q k^\top}{\sqrt{d}}\right) v \qquad q: [\text{places}, d], \quad k, v: [77, d]$$
#
# $d$ is the width of a head. In FLUX text and image are one sequence (lesson 06), and both change. Where is each word
# read? In the old one from the three layers of the last level up, 16 × 16 places; in FLUX from its 19 double blocks, 8 × 8.

# %%
state = states[10]
with trace(old.unet, only="up_blocks/3/*/attn2/to_[qk]") as walk:
    old.unet(state.sample, state.timestep, prompt_text)


def cross_attention(layer):
    """Probabilities [heads, places, 77] of one layer."""
    split = "1 rows (heads dim) -> heads rows dim"
    q, k = (
        rearrange(walk[f"{layer}/to_{each}"], split, heads=old.unet.config.heads) for each in "qk"
    )
    return (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(dim=-1)


layers = sorted({name.rpartition("/")[0] for name in walk})
read = torch.stack([cross_attention(layer) for layer in layers]).mean(dim=(0, 1))
assert read.shape == (256, 77)
assert torch.allclose(read.sum(dim=1), torch.ones(256))
pieces = old.tokenizer.pieces_of(old.tokenizer(PROMPT)[0].tolist())
print(len(layers), "layers;", pieces[:19])

# %%
from flux_lab.instruments.words import word_map

with trace(new, only="step 02/double ??/attn/probabilities", probabilities=True) as joint:
    new_states = list(new.steps(PROMPT, num_inference_steps=6, generator=seeded()))
new_pieces = new.tokenizer_2.pieces_of(new.tokenizer_2(PROMPT)[0].tolist())
WORDS = ["red", "sphere", "blue", "cube", "wooden"]
old_maps, new_maps = {}, {}
for word in WORDS:
    place = next(i for i, piece in enumerate(pieces) if piece.startswith(word))
    old_maps[word] = read[:, place].reshape(16, 16)
    place = next(i for i, piece in enumerate(new_pieces) if piece.startswith("▁" + word))
    new_maps[word] = torch.stack(
        [word_map(each[0].float(), place, 32, rows=8, columns=8) for each in joint.values()]
    ).mean(dim=0)


# %%
def relative(maps):
    """Each map over its largest value, which goes into its name."""
    return {f"{word}, {100 * each.max():.2g} %": each / each.max() for word, each in maps.items()}


both = [states[-1].image("latents"), new_states[-1].image("latents")]
show(
    plots.small_grid({"": both}, ["old miniature", "FLUX's miniature"], cell=1.3),
    alt="The pictures whose attention is shown below: that of the old miniature and that of FLUX's, for the same prompt.",
)

# %%
show(
    plots.heat_maps(relative(old_maps), "attention (1 = largest)"),
    alt="The old miniature: where the words red, sphere, blue, cube and wooden are read, 16 by 16 places.",
)

# %%
show(
    plots.heat_maps(relative(new_maps), "attention (1 = largest)"),
    alt="FLUX's miniature: where the same five words are read in its double-stream blocks, 8 by 8 places.",
)

# %% [markdown]
# *What to see*: each map has its own scale, from nothing to its largest value; that stands above it, as a share of a
# place's attention. A word that is understood may have its peak on its own object: in FLUX's miniature `red` and
# `blue` do. A word for the floor, such as `wooden`, has no object: look whether it is read most in the lower rows.
# The two texts differ too: CLIP learned to tell whole captions apart and needs no order of words for that, T5 to
# rebuild texts word by word.
#
# How is the attention of a place divided? And does the text change?

# %%
end = pieces.index("<|endoftext|>")
parts = {
    "start token": read[:, 0],
    "words": read[:, 1:end].sum(dim=1),
    "end and padding": read[:, end:].sum(dim=1),
}
print(
    "SD 1.5's way, of the attention of a place:",
    {name: f"{each.mean():.0%}" for name, each in parts.items()},
)
with trace(new.transformer, only=["embedded/text", "double 18/text"]) as streams:
    new(PROMPT, num_inference_steps=1, output_type="latent")
before, after = streams["embedded/text"][0, :10], streams["double 18/text"][0, :10]
print(
    f"FLUX: ten words before and after 19 blocks, mean cosine {F.cosine_similarity(before, after).mean():.2f}"
)
crosses = [name for name, _ in old.unet.named_modules() if name.endswith("attn2")]
print(f"SD 1.5: {len(crosses)} cross attentions read one and the same tensor")

# %% [markdown]
# A softmax must spend its 100 % somewhere. Where no word matters, it goes to tokens that are no words: start, end and
# padding, which is not masked here either. In FLUX the image has itself to look at. And a cosine of 1 would mean that the text came through
# the blocks unturned: FLUX's words know something of the picture behind every block, SD 1.5's never do.
#
# ## Guidance: two passes against one number
#
# **Classifier-free guidance** (CFG) asks twice, with the prompt and without, and goes *beyond* the answer with it:
#
# $$\epsilon = \epsilon_\text{empty} + w\,(\epsilon_\text{prompt} - \epsilon_\text{empty})$$
#
# $w$ is the guidance scale, 7.5 by default. FLUX.1-dev was trained to give the guided answer at once, with $w$ as an input:
# **distilled guidance**. Count what goes through each network in 4 steps:

# %% tags=["nbval-check-output"]
batches = []
hooks = [
    network.register_forward_hook(lambda module, given, answer: batches.append(len(answer)))
    for network in (old.unet, new.transformer)
]
for name, pipe in (("SD 1.5", old), ("FLUX", new)):
    batches.clear()
    pipe(PROMPT, num_inference_steps=4)
    print(
        f"{name:6} 4 steps: {len(batches)} calls with a batch of {batches[0]}, {sum(batches)} latents in all"
    )
for hook in hooks:
    hook.remove()

# %%
scales = [1.0, 7.5, 15.0]
strong = [1.0, 3.5, 6.0]
with flux_lab.shapes.checks(enabled=False):
    rows = [
        old(PROMPT, latents=start, guidance_scale=w, num_inference_steps=12).images[0]
        for w in scales
    ]
    rows += [
        new(PROMPT, generator=seeded(), guidance_scale=w, num_inference_steps=6).images[0]
        for w in strong
    ]
titles = [f"SD 1.5\nw = {w}" for w in scales] + [f"FLUX\nw = {w}" for w in strong]
show(
    plots.small_grid({"": rows}, titles, cell=0.85),
    alt="The same prompt with three guidance scales from the old miniature, and with three from FLUX's miniature.",
)

# %% [markdown]
# *What to see*: at 1 there is no guidance in SD 1.5. With a large scale its colours get hard, because an answer that
# is extrapolated leaves the range of what was trained. FLUX's miniature was trained with scales from 1 to 6, so its
# network knows what to do with each: the objects stay clean. What can suffer at the end of its range is the floor.
#
# ### No prompt: zeros are not the empty caption
#
# What is "without the prompt"? In training one caption in ten was replaced by the *empty* one. So the text is that of 77
# tokens, a start, an end, and padding. A tensor of zeros was never seen. What does cross attention make of zeros? Keys and
# values have no biases, so they are zero too; every score is equal, the values vanish, and only one bias is left:

# %%
zeros, seen = torch.zeros_like(prompt_text), {}
crosses = [module for name, module in old.unet.named_modules() if name.endswith("attn2")]


def remember(module, given, result):
    seen[module] = result


hooks = [module.register_forward_hook(remember) for module in crosses]
old.unet(x_t, 500, zeros)
for hook in hooks:
    hook.remove()
apart = [(result - module.to_out[0].bias).abs().max() for module, result in seen.items()]
largest = max(apart).item()
print(f"{len(seen)} cross attentions: largest difference to the bias of `to_out`: {largest:.1e}")
assert largest < 1e-5
print(
    f"lengths: a vector of the empty caption {empty[0].norm(dim=1).mean():.1f}, of the prompt {prompt_text[0].norm(dim=1).mean():.1f}"
)

# %%
seeds = [torch.randn(1, 4, 16, 16, generator=seeded(seed)) for seed in range(1, 3)]
pair_of = {"latents": torch.cat(seeds), "num_inference_steps": 10, "num_images_per_prompt": 2}
against_zeros = pair_of | {"negative_prompt_embeds": zeros}
with flux_lab.shapes.checks(enabled=False):
    grid = {
        "empty caption,\nno guidance": old("", guidance_scale=1.0, **pair_of).images,
        "zeros,\nno guidance": old(prompt_embeds=zeros, guidance_scale=1.0, **pair_of).images,
        "prompt against\nempty caption": old(PROMPT, guidance_scale=4.0, **pair_of).images,
        "prompt against\nzeros": old(PROMPT, guidance_scale=4.0, **against_zeros).images,
    }
show(
    plots.small_grid(grid, [f"seed {seed}" for seed in range(1, 3)], cell=0.75),
    alt="Four rows of pictures from two seeds: the empty caption alone, zeros alone, and the prompt guided away from each of them.",
)

# %% [markdown]
# *What to see*: the first row is what the network was trained to do without a caption: some table top. The second row asks
# it something that it never saw; whatever it draws, nobody taught it. As the negative side of guidance, the last two rows,
# the difference is that between a trained answer and luck. In FLUX zeros would not even stay zeros: its first layer for
# text, `context_embedder`, has a bias. True CFG there (lesson 10) uses a real negative prompt, too.
#
# ## The real code
#
# The forward pass of the UNet. The seam for a ControlNet is the `if` in the middle.

# %%
source(UNet2DConditionModel.forward, docstring=False)

# %% [markdown]
# The loop, with the same six numbers in its comments as FLUX's (lesson 00). Compare step 5.

# %%
source(StableDiffusionPipeline.steps, docstring=False)

# %%
source(sd15.noise_schedule.NoiseSchedule.add_noise, docstring=False)

# %% [markdown]
# One step of PNDM. `_transfer` goes from one noise level to another along a given slope; it is exact where the predicted
# noise stays the same.

# %%
source(PNDMScheduler.step_plms, docstring=False)

# %%
source(PNDMScheduler._transfer, docstring=False)

# %%
source(sd15.attention.Attention.forward, docstring=False)

# %% [markdown]
# ## Shapes

# %% tags=["nbval-check-output"]
noise = torch.zeros(1, 4, 64, 64, device="meta")
answer = giant(noise, torch.tensor(500, device="meta"), torch.zeros(1, 77, 768, device="meta"))
assert epsilon.shape == x_t.shape == (1, 4, 16, 16)
assert answer.shape == (1, 4, 64, 64)
fluxes = FLUX_1_DEV.shapes()
rows = [("text", list(text.shape), [1, 77, SD15_UNET.cross_attention_dim], fluxes["prompt_embeds"])]
rows.append(("latents", list(x_t.shape), list(noise.shape), fluxes["latents"]))
rows.append(("answer", list(epsilon.shape), list(answer.shape), fluxes["velocity"]))
print(Table(["tensor", "old miniature", "SD 1.5", "FLUX.1-dev"], rows))

# %% [markdown]
# Three wrong shapes: FLUX's latents, FLUX's text, and residuals of which one is missing.

# %% tags=["nbval-check-output"]
wrong = {
    "latents": (torch.zeros(1, 16, 16, 16), 500, text),
    "text": (x_t, 500, torch.zeros(1, 32, 128)),
    "residuals": (x_t, 500, text, small_seams[:-2], small_seams[-1]),
}
for arguments in wrong.values():
    try:
        old.unet(*arguments)
    except ValueError as error:
        print(error, end="\n\n")

# %% [markdown]
# ## Trust, then verify
#
# `diffusers` reads the same folder. It is asked for the same picture, and each part is compared by itself.

# %%
import diffusers
import transformers

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()
reference = diffusers.StableDiffusionPipeline.from_pretrained(
    SD15, safety_checker=None, dtype=torch.float32
)
reference.set_progress_bar_config(disable=True)
theirs = reference.vae.encode(x[:2]).latent_dist

# %%
extra = {
    "down_block_additional_residuals": [0.1 * state for state in small_seams[:-1]],
    "mid_block_additional_residual": 0.1 * small_seams[-1],
}
steered = [unet(x_t, 500, text, **extra) for unet in (old.unet, reference.unet)]
pairs = {
    "text": (prompt_text, reference.text_encoder(old.tokenizer(PROMPT)).last_hidden_state),
    "moments": (old.vae.encode(x[:2]).mean, theirs.mean),
    "UNet": (epsilon, reference.unet(x_t, 500, text).sample),
    "UNet, with residuals": (steered[0], steered[1].sample),
    "decoder": (old.vae.decode(theirs.mean), reference.vae.decode(theirs.mean).sample),
}
for name, (ours, other) in pairs.items():
    print(f"{name:21} largest difference {(ours - other).abs().max():.1e}")
    assert torch.allclose(ours, other, atol=1e-3, rtol=1e-4)

# %%
two = [pipe(PROMPT, latents=start, num_inference_steps=8).images[0] for pipe in (old, reference)]
difference = np.abs(np.asarray(two[0], dtype=int) - np.asarray(two[1]))
print("whole pictures, 8 steps: largest difference", difference.max(), "of 255")
assert difference.max() <= 2

# %% tags=["nbval-check-output"]
their_pndm = diffusers.PNDMScheduler.from_config(reference.scheduler.config)
their_ddpm = diffusers.DDPMScheduler.from_config(SD15_DDPM.to_dict())
for steps in (50, 25, 10, 7):
    for ours, other in (
        (PNDMScheduler(SD15_PNDM), their_pndm),
        (DDPMScheduler(SD15_DDPM), their_ddpm),
    ):
        ours.set_timesteps(steps)
        other.set_timesteps(steps)
        assert ours.timesteps.tolist() == other.timesteps.tolist()
assert torch.equal(
    schedule.add_noise(x0, n, torch.tensor([321])), their_ddpm.add_noise(x0, n, torch.tensor([321]))
)
their_processor = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=8)
assert torch.equal(processor.preprocess(photo), their_processor.preprocess(photo))
print("timesteps of both schedulers, add_noise and the image processor agree in every number")

# %% [markdown]
# ## Turn the knob
#
# **From any timestep, in any number of steps.** A rendered scene gets the noise of timestep $t$. In the middle, one look
# of the network. On the right a walk from there down to the picture, in so many steps. This is image-to-image: $t$ is what
# is called *strength*.


# %%
def from_timestep(t=600, steps=8, scene=0):
    z, words = latents["4 channels"][scene : scene + 1], old.encode_prompt(standard(scenes[scene]))
    noisy = schedule.add_noise(z, start, torch.tensor([t]))
    one_look = schedule.predict_original_sample(guided(noisy, t, words, empty, 3.0), t, noisy)
    timesteps = torch.linspace(t, max(1, t // (steps + 1)), steps).round().long()
    with flux_lab.shapes.checks(enabled=False):
        walked = euler_walk(noisy, timesteps, words, empty, 3.0)
    shown = [
        Image.fromarray(images[scene]),
        *(old.decode(each)[0] for each in (noisy, one_look, walked)),
    ]
    return plots.small_grid(
        {"": shown}, ["rendered", f"noise of t = {t}", "one look", f"steps: {steps}"], cell=1.1
    )


# %%
explore(
    from_timestep,
    t=(20, 980, 20),
    steps=(1, 25),
    scene=(0, 11),
    alt="A rendered scene, the same with the noise of t = 600, the network's picture in one look, and after 8 steps.",
)

# %% [markdown]
# Where is the border between getting the scene *back* and getting *another* one that fits the caption? And with which
# number of steps does the right picture stop changing?
#
# **Scale the seams of one size.** At which factor does the picture break, and what changes before it does?


# %%
def scaled(group="8 × 8", factor=0.5):
    pictures = scaled_walk({}, {group: factor})
    return plots.small_grid(
        {"": pictures}, ["undisturbed", f"{group}: times {factor:g}"], cell=1.05
    )


explore(
    scaled,
    group=list(GROUPS),
    factor=(0.0, 3.0, 0.25),
    alt="The prompt's picture undisturbed, and with its 8 by 8 skips at half their strength.",
)

# %% [markdown]
# ## Break it
#
# **Predict first**: all twelve skips are turned off, or the middle block, or only the skips at full size. Which picture
# will still show a scene? Five walks as one batch:

# %%
trials = {"nothing off": {}, "all skips off": dict.fromkeys(sizes, 0.0)}
trials |= {f"{group} off": {group: 0.0} for group in ("16 × 16", "4 × 4, 2 × 2", "middle")}
show(
    plots.small_grid({"": scaled_walk(*trials.values())}, list(trials), cell=1.05),
    alt="Five pictures of one prompt and noise: whole, without any skip, without those at full size, without the deep ones, and"
    " without the middle block.",
)

# %% [markdown]
# *What to see*: without the skips the network cannot name the noise in detail, so the walk does not take it away. What is
# the middle block's part in the picture, which so much is led through?
#
# **Predict**: the latents are those of $t = 500$, but the network is told another timestep. Is the time needed at all,
# where the noise can be *seen*?

# %%
told = [100, 300, 500, 700, 900]
batch = (x_t.expand(5, -1, -1, -1), torch.tensor(told), text.expand(5, -1, -1))
answers = old.unet(*batch)
shown = [
    old.decode((x_t - (1 - kept[500]) ** 0.5 * each[None]) / kept[500] ** 0.5)[0]
    for each in answers
]
for t, each in zip(told, answers, strict=True):
    print(
        f"told t = {t:3}: error of the noise {(each - n[0]).square().mean():.3f}, its deviation {each.std():.2f}"
    )
show(
    plots.small_grid({"": shown}, [f"told t = {t}" for t in told], cell=0.9),
    alt="Five predicted pictures from the same latents of t = 500, the network being told five different timesteps.",
)

# %% [markdown]
# *What to see*: where the error is smallest, and how far off the truth that is. The network has learned to use both: what
# it sees and what it is told. Told a wrong time, it looks for another amount of noise than there is.
#
# ## Common misreadings
#
# **"0.18215 is a magic number."** You have computed it for another autoencoder: one over the deviation of its latents.
# Without it the walk ends at latents of the wrong strength:

# %%
right, forgotten = old.vae.decode(x0 / old.vae.config.scaling_factor), old.vae.decode(x0)
for name, image in (("divided by the factor", right), ("factor forgotten", forgotten)):
    byte = np.asarray(old.image_processor.postprocess(image)[0])[None]
    print(
        f"{name:22} {psnr(images[:1], byte)[0]:.1f} dB, deviation of the pixels {image.std():.2f}"
    )

# %% [markdown]
# **"50 steps are 50 evaluations."** With PNDM 51, and with guidance each has a batch of two: 102 latents go through the
# UNet for one picture. FLUX.1-dev: 28. Both were counted above, for 4 steps.
#
# **"CLIP gives FLUX the words, as it did in Stable Diffusion."** The same text encoder, but another of its results:

# %% tags=["nbval-check-output"]
both = old.text_encoder(old.tokenizer(PROMPT))
print(
    "SD 1.5 reads last_hidden_state", list(both.last_hidden_state.shape), "and never pooler_output"
)
used = new.encode_prompt(PROMPT)
print(
    "FLUX reads pooler_output",
    list(used.pooled_prompt_embeds.shape),
    "and takes the words from T5",
    list(used.prompt_embeds.shape),
)

# %% [markdown]
# **"`guidance_scale` means the same in both."** In SD 1.5 it multiplies a difference of two answers; in FLUX.1-dev it is an
# input of the network, and there is one answer. FLUX has the old way too, as `true_cfg_scale`. 7.5 is the usual value in
# one and outside what FLUX's miniature was trained with (1 to 6).
#
# **"`attention_head_dim = 8`: a head of SD 1.5 is 8 numbers wide."** It is the *number* of heads. The name is an old
# mistake that the checkpoints keep. So heads get wider from level to level; FLUX's have one width:

# %% tags=["nbval-check-output"]
print(
    "SD 1.5: ",
    SD15_UNET.heads,
    "heads, widths",
    [channels // SD15_UNET.heads for channels in SD15_UNET.block_out_channels],
)
transformer = FLUX_1_DEV.transformer
print(
    "FLUX.1-dev:", transformer.num_attention_heads, "heads, width", transformer.attention_head_dim
)

# %% [markdown]
# **"The network predicts the noise that the last timestep added."** It predicts *all* the noise in $x_t$, at once. Take two
# neighbours, $x_{499}$ made first and $x_{500}$ from it with a little new noise, and see which of the two the answer
# resembles:

# %%
new_noise = torch.randn(x0.shape, generator=seeded(9))
before = schedule.add_noise(x0, n, torch.tensor([499]))
after = (1 - schedule.betas[500]) ** 0.5 * before + schedule.betas[500] ** 0.5 * new_noise
answer = old.unet(after, 500, text)
for name, each in (("all noise before", n), ("the last timestep's noise", new_noise)):
    print(
        f"likeness (cosine) of the answer to {name:26} {F.cosine_similarity(answer.flatten(), each.flatten(), dim=0):.2f}"
    )

# %% [markdown]
# **"An empty prompt and zeros are the same."** Measured above: zeros silence cross attention up to a bias, the empty
# caption is 77 vectors that were trained.
#
# ## Your turn
#
# ### Exercise 1: noise at a timestep (medium, 15 minutes)
#
# `picture` and `noise` are `[batch, channels, rows, columns]`, `timesteps` is `[batch]`: a timestep for each picture.
# `betas` is a table with the variance that each timestep adds. Give $x_t$ for the batch.


# %% tags=["exercise"]
def noised_at(picture, noise, timesteps, betas):
    """Each picture mixed with its noise, as much as its timestep says."""
    raise NotImplementedError


# %%
from flux_lab.exercises import check

check("noised_at", noised_at)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# $a_t$ is the product of all $1 - \beta_i$ up to $t$: `torch.cumprod(..., dim=0)` gives the whole table.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Pick with `[timesteps]`, and make it `[batch, 1, 1, 1]` with `[:, None, None, None]`. The weights are the *roots* of $a_t$
# and $1 - a_t$.
#
# </details>


# %% tags=["solution"]
def noised_at(picture, noise, timesteps, betas):
    """Each picture mixed with its noise, as much as its timestep says."""
    kept = torch.cumprod(1 - betas, dim=0)[timesteps][:, None, None, None]
    return kept**0.5 * picture + (1 - kept) ** 0.5 * noise


# %% [markdown]
# ### Exercise 2: from noise to velocity (medium, 15 minutes)
#
# A UNet says `epsilon` for `sample`, which is $x_t$; `kept` is $a_t$, a number. Give what FLUX's network would say: the
# velocity, noise minus picture.


# %% tags=["exercise"]
def flux_velocity(sample, epsilon, kept):
    """FLUX's velocity from SD 1.5's predicted noise."""
    raise NotImplementedError


# %%
check("flux_velocity", flux_velocity)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# First the picture: solve $x_t = \sqrt{a_t}\,x_0 + \sqrt{1 - a_t}\,\epsilon$ for $x_0$.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `picture = (sample - (1 - kept) ** 0.5 * epsilon) / kept**0.5`.
#
# </details>


# %% tags=["solution"]
def flux_velocity(sample, epsilon, kept):
    """FLUX's velocity from SD 1.5's predicted noise."""
    picture = (sample - (1 - kept) ** 0.5 * epsilon) / kept**0.5
    return epsilon - picture


# %% [markdown]
# ### Exercise 3: guidance (easy, 5 minutes)
#
# `both` is the UNet's answer for a doubled batch, `[2 * batch, channels, rows, columns]`. The first half was predicted
# without the prompt, the second half with it. Give the guided noise, `[batch, channels, rows, columns]`.


# %% tags=["exercise"]
def guided_noise(both, scale):
    """Classifier-free guidance."""
    raise NotImplementedError


# %%
check("guided_noise", guided_noise)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `both.chunk(2)` gives the two halves. With a scale of 1 the answer must be the one with the prompt.
#
# </details>


# %% tags=["solution"]
def guided_noise(both, scale):
    """Classifier-free guidance."""
    without, with_prompt = both.chunk(2)
    return without + scale * (with_prompt - without)


# %% [markdown]
# ### Exercise 4: all skips (hard, 20 minutes)
#
# A UNet takes latents of `sample_size` places a side. `block_out_channels` are the channels of its levels, and each level
# has `layers_per_block` layers on the way down. Give (channels, side) of every skip, a list of tuples in the order in which
# they are made. For SD 1.5, `(64, (320, 640, 1280, 1280), 2)`, it has 12 entries.


# %% tags=["exercise"]
def skip_shapes(sample_size, block_out_channels, layers_per_block):
    """(channels, side) of every skip."""
    raise NotImplementedError


# %%
check("skip_shapes", skip_shapes)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Look at the table of residuals. The first entry is `conv_in`'s. Then each level gives its layers and a downsampler; which
# level has none?
#
# </details>
# <details><summary>Hint 2</summary>
#
# A downsampler keeps the channels and halves the side. The next level's first layer changes the channels.
#
# </details>


# %% tags=["solution"]
def skip_shapes(sample_size, block_out_channels, layers_per_block):
    """(channels, side) of every skip."""
    side, skips = sample_size, [(block_out_channels[0], sample_size)]
    for level, channels in enumerate(block_out_channels):
        skips += [(channels, side)] * layers_per_block
        if level < len(block_out_channels) - 1:
            side //= 2
            skips.append((channels, side))
    return skips


# %% [markdown]
# ## Recap
#
# 1. Latents: 4 channels and one factor against 16 channels, a factor and a shift. 0.18215 is one over a deviation, and each
#    autoencoder has its own.
# 2. Noise: a table of 1000 levels whose weights' squares add up to 1, never quite pure noise, against a line of levels that
#    starts at pure noise. PNDM's 50 steps are 51 evaluations.
# 3. Epsilon, $x_0$, $v$ and FLUX's velocity say the same thing. What differs is how much an error counts at each level.
# 4. A UNet narrows and needs skips, 13 seams of many shapes; FLUX keeps one width. Cross attention reads a text that never
#    changes; joint attention changes both.
# 5. CFG is two answers, distilled guidance one. Zeros are no empty caption: they silence cross attention.
#
# **Next**: back to the present. Lesson 13 picks up the real FLUX.1-dev: 11,901,408,320 numbers of the transformer, 24 GB in
# 16 bits, and a card that has 16.
