# %% [markdown]
# # 08 · The transformer: the whole pass, what it costs, and what each block is for
#
# After this lesson you can
#
# - run FLUX's transformer by hand, from latents and text to the velocity, in six steps;
# - say where its parameters, its work and its memory are, for FLUX.1-dev, FLUX.1-schnell and the miniature;
# - find a bug by comparing two models operation by operation, and visit each of the 57 blocks by turning it off.
#
# **Time**: half a minute to run, 75 minutes to study. **You need**: lessons 03 to 07.

# %%
import copy

import torch

import flux_lab
from flux_lab import instruments
from flux_lab.instruments import (
    FLUX_1_DEV,
    Table,
    ablate,
    compare,
    explore,
    plots,
    show,
    source,
    trace,
)
from flux_lab.latents import pack_latents, prepare_latent_image_ids, prepare_noise
from flux_lab.transformer import named_blocks

torch.set_grad_enabled(False)  # nothing is trained here
pipe = flux_lab.load_mini()
pipe.set_progress_bar_config(disable=True)
model = pipe.transformer
mini = instruments.anatomy_of(pipe)
PROMPT = "a large shiny red sphere to the left of a small blue cube on a wooden floor"
STEPS = 10


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## You are here

# %%
show(
    plots.pipeline_map("transformer", shapes=(mini, FLUX_1_DEV)),
    alt="Map of the pipeline with the transformer and everything in it lit.",
)

# %% [markdown]
# ## The idea
#
# The transformer is one function. It is called once in every step:
#
# $$v = f(x,\ \text{words},\ \text{pooled},\ \sigma,\ g,\ \text{ids})$$
#
# | symbol | what it is | miniature | FLUX.1-dev |
# |---|---|---|---|
# | $x$ | noisy latents as tokens | `[1, 64, 64]` | `[1, 4096, 64]` |
# | words | T5's vector for every text token | `[1, 32, 128]` | `[1, 512, 4096]` |
# | pooled | CLIP's vector for the whole prompt | `[1, 64]` | `[1, 768]` |
# | $\sigma$, $g$ | noise level, guidance scale | `[1]`, `[1]` | the same |
# | ids | positions: (unused, row, column) | `[32 + 64, 3]` | `[512 + 4096, 3]` |
# | $v$ | the velocity, noise minus picture | `[1, 64, 64]` | `[1, 4096, 64]` |
#
# You know every part of it. This lesson puts the parts together. First we make an input: a noisy picture from the middle
# of a run.

# %%
states = list(pipe.steps(PROMPT, generator=seeded(), num_inference_steps=STEPS))
full = states[-1].image()
middle = 4  # the step we look into
x, sigma = states[middle - 1].latents, states[middle].sigma
words = pipe.encode_prompt(PROMPT)
inputs = {
    "hidden_states": x,
    "encoder_hidden_states": words.prompt_embeds,
    "pooled_projections": words.pooled_prompt_embeds,
    "timestep": torch.tensor([sigma]),
    "img_ids": prepare_latent_image_ids(rows=8, columns=8),
    "txt_ids": words.text_ids,
    "guidance": torch.tensor([3.5]),
}
print(f"step {middle + 1} of {STEPS}, sigma = {sigma:.3f}")

# %% [markdown]
# ## The pass, by hand
#
# **1. Two linear layers** bring latents and words to one width: 96 channels here, 3072 in FLUX.1-dev. A small function
# prints each shape beside FLUX.1-dev's, which comes from a pass on the `meta` device: shapes without numbers.


# %% tags=["nbval-check-output"]
dev = instruments.trace_shapes(FLUX_1_DEV)


def beside(name, tensor):
    print(f"{name:16} miniature {list(tensor.shape)!s:15} FLUX.1-dev {list(dev[name].shape)}")


image = model.x_embedder(inputs["hidden_states"])
text = model.context_embedder(inputs["encoder_hidden_states"])
beside("embedded/image", image)
beside("embedded/text", text)
assert image.shape == (1, 64, 96)
assert dev["embedded/image"].shape == (1, 4096, 3072)

# %% [markdown]
# **2. The conditioning vector** holds all that concerns the picture as a whole: noise level, guidance, pooled text.
#
# **3. The rotations** tell each token its place. Text comes first.

# %% tags=["nbval-check-output"]
temb = model.time_text_embed(
    1000 * inputs["timestep"], 1000 * inputs["guidance"], inputs["pooled_projections"]
)
rotation = model.pos_embed(torch.cat([inputs["txt_ids"], inputs["img_ids"]]))
beside("conditioning", temb)
beside("rope/cos", rotation[0])

# %% [markdown]
# **4. Nineteen double-stream blocks**: text and image keep weights of their own and meet in attention. **5. Thirty-eight
# single-stream blocks**: one sequence, one set of weights. Both kinds take and give the two streams, and no block changes
# a shape.

# %% tags=["nbval-check-output"]
around = {"temb": temb, "image_rotary_emb": rotation}
for block in model.transformer_blocks:
    text, image = block(hidden_states=image, encoder_hidden_states=text, **around)
beside("double 18/text", text)
beside("double 18/image", image)
for block in model.single_transformer_blocks:
    text, image = block(hidden_states=image, encoder_hidden_states=text, **around)
beside("single 37/text", text)
beside("single 37/image", image)

# %% [markdown]
# **6. The last layer**: a norm with scale and shift from the conditioning vector, and a linear layer back to 64 numbers a
# token. It takes the image only. The text has done its work and is dropped.

# %% tags=["nbval-check-output"]
velocity = model.proj_out(model.norm_out(image, temb))
beside("velocity", velocity)
print("equal to the model's own answer:", torch.equal(velocity, model(**inputs)))
assert torch.allclose(velocity, model(**inputs), atol=1e-6)

# %% [markdown]
# ## A full trace
#
# `trace` records every named tensor of a run by hooks, from outside. Here of one pass, with all that attention holds:

# %%
with trace(model) as t:
    model(**inputs)
print(t)
t.table(filter="double 07/*")

# %% [markdown]
# Two dozen tensors of one block, in the order of the run. `axes` says what each axis is. Which of all the image streams has
# the largest spread? `sort="-std"` puts the largest first.


# %%
def top(table, rows=6):
    return Table(table.header, table.rows[:rows])


top(t.table(sort="-std", filter="* ??/image"))

# %% [markdown]
# And the gates, those with the smallest spread first. A gate whose mean and spread are small lets little of what its
# half of the block computes through, at this noise level.

# %%
top(t.table(sort="std", filter="*/gate"))

# %% [markdown]
# A stream is never replaced: every block *adds* to it. So it may grow from block to block, or shrink where what is
# added points against it.

# %%
blocks = list(named_blocks(model))
spread = {stream: [t[f"{name}/{stream}"].std() for name in blocks] for stream in ("text", "image")}
show(
    plots.curves_by_block(spread, blocks, ylabel="standard deviation of the stream"),
    alt="Standard deviation of the text and image streams behind each of the 57 blocks.",
)
largest = max(spread["image"])
print(
    f"image stream: {spread['image'][0]:.2f} behind the first block, {spread['image'][-1]:.2f}"
    f" behind the last, at most {largest:.2f}"
)

# %% [markdown]
# *What to see*: two curves from block to block. A step shows a block that made the stream longer or shorter. Where a
# curve is flat, blocks add little, or they turn the tokens without making them longer. The text curve goes on to the
# end, though nobody reads the text behind the last block.
#
# The same trace runs on `meta` for the sizes of FLUX.1-dev, beside it FLUX.1-schnell and the miniature. An empty cell:
# the tensor does not exist there.

# %%
from flux_lab.instruments.work import FLUX_1_SCHNELL

SOME = (
    "embedded/*",
    "conditioning*",
    "double 00/attn/*",
    "double 00/image",
    "single 00/mlp/*",
    "single 00/update",
    "velocity",
)
instruments.side_by_side(mini, FLUX_1_DEV, FLUX_1_SCHNELL, only=SOME)

# %% [markdown]
# schnell reads 256 text tokens in place of 512, and has no guidance. All else is FLUX.1-dev's.
#
# ## What it costs
#
# ### Parameters
#
# Each part's share, in the three models.

# %% tags=["nbval-check-output"]
from flux_lab.instruments.work import at_size, flops_by_part, parameters_by_part, pipeline_flops

models = (FLUX_1_DEV, FLUX_1_SCHNELL, mini)
counts = {anatomy.name: parameters_by_part(anatomy) for anatomy in models}
print(f"{'parameters of':26}", *(f"{name:>15}" for name in counts))
for part in counts["miniature"]:
    print(f"{part:26}", *(f"{count[part]:15,}" for count in counts.values()))
print(f"{'all':26}", *(f"{sum(count.values()):15,}" for count in counts.values()))
assert sum(counts["FLUX.1-dev"].values()) == 11_901_408_320

# %% [markdown]
# FLUX.1-dev and schnell differ in one line: the MLP that reads the guidance scale. The output layer of a single-stream block
# serves attention and MLP together; it is counted with the MLP.
#
# ### Work
#
# Work is counted in **FLOPs**: one multiplication or one addition is one. A product of matrices `[a, b]` and `[b, c]`
# takes $2abc$. PyTorch's counter adds them up on the `meta` device, so nothing is computed. TFLOP: $10^{12}$.

# %% tags=["nbval-check-output"]
work = {anatomy.name: flops_by_part(anatomy) for anatomy in models}
for name, flops in work.items():
    total, product = sum(flops.values()), flops["attention product"]
    print(
        f"{name:15} {total / 1e12:9.4f} TFLOP for one pass, {100 * product / total:4.1f} % of it"
        " between tokens, in attention"
    )
assert sum(work["FLUX.1-dev"].values()) == 74_384_653_418_496

# %%
rows = {}
for name in ("FLUX.1-dev", "miniature"):
    rows[f"{name}:\nparameters"], rows[f"{name}:\nFLOPs"] = counts[name], work[name]
show(
    plots.stacked_bars(rows, xlabel="share, in percent", share=True),
    alt="Shares of parameters and FLOPs by part, for FLUX.1-dev and the miniature."
    " The modulation has more than a quarter of the parameters and next to none of the work.",
)

# %% [markdown]
# *What to see*: compare the two bars of a model. **Modulation** holds 27 % of all parameters and does next to none of the
# work: it acts on one vector for each picture, everything else on every token. **The attention product** has no
# parameters at all, and takes its share of the work. Both models divide their parameters alike.
#
# How does the work grow with the picture? Twice the side, four times the tokens.

# %%
SIDES = (512, 1024, 1536, 2048, 2560)
grown = {side: flops_by_part(at_size(FLUX_1_DEV, side)) for side in SIDES}
product = {side: flops["attention product"] / 1e12 for side, flops in grown.items()}
rest = {side: sum(flops.values()) / 1e12 - product[side] for side, flops in grown.items()}
show(
    plots.growth(
        {"everything else": rest, "attention product": product},
        xlabel="pixels along each side of the picture",
        ylabel="TFLOP for one pass",
    ),
    alt="Work of one FLUX.1-dev pass against picture size: the attention product overtakes the rest"
    " between 2048 and 2560 pixels.",
)

# %% [markdown]
# *What to see*: the attention product grows with the square of the sequence, all else in proportion to it. At 1024 pixels
# the attention product is a fifth of the work; at 2560 it is the larger part.
#
# And the other models? They run once for a picture, the transformer in every step:

# %% tags=["nbval-check-output"]
for anatomy, steps in ((FLUX_1_DEV, 28), (FLUX_1_SCHNELL, 4), (mini, 28)):
    calls = {"text_encoder": 1, "text_encoder_2": 1, "transformer": steps, "vae": 1}
    total = {part: calls[part] * flops / 1e12 for part, flops in pipeline_flops(anatomy).items()}
    listed = ", ".join(f"{part} {flops:.3g}" for part, flops in total.items())
    print(f"{anatomy.name}, {steps} steps: {sum(total.values()):,.3g} TFLOP ({listed})")

# %% [markdown]
# ### Memory
#
# A number takes 2 bytes in bf16 and 4 in `float32`. All weights must be somewhere. On top come the **activations**: the
# tensors that a pass holds while it runs. We count those that are alive at the worst moment, again on `meta`. GB: $10^9$
# bytes.

# %%
from flux_lab.instruments.activations import peak_activations


def memory(anatomy, dtype):
    weights = {
        part: count * dtype.itemsize / 1e9
        for part, count in instruments.parameter_counts(anatomy).items()
    }
    return weights | {"activations of a pass": peak_activations(anatomy, dtype) / 1e9}


rows = {"bf16": memory(FLUX_1_DEV, torch.bfloat16), "float32": memory(FLUX_1_DEV, torch.float32)}
show(
    plots.stacked_bars(rows, xlabel="memory of FLUX.1-dev, GB", marks={"16 GB": 16, "24 GB": 24}),
    alt="Memory of FLUX.1-dev by part in bf16 and in float32, with marks at 16 and 24 GB:"
    " everything at once fits neither.",
)

# %%
small = memory(mini, torch.float32)
print(
    "miniature in float32, MB:",
    ", ".join(f"{part} {1000 * size:.1f}" for part, size in small.items()),
)
for anatomy in (mini, FLUX_1_DEV):
    fused, written_out = (
        peak_activations(anatomy, torch.bfloat16, fused) / 1e6 for fused in (True, False)
    )
    print(
        f"{anatomy.name:10} activations in bf16: {fused:7,.1f} MB, with attention written out"
        f" {written_out:7,.1f} MB"
    )

# %% [markdown]
# *What to see*: in bf16 the weights of transformer and T5 alone are more than a card of 24 GB holds. Lesson 13 makes them
# fit into 16. The last lines: an attention kernel that never writes down the matrix of probabilities, `[24, 4608, 4608]`
# in FLUX.1-dev, saves most of the activations.
#
# ## The real code
#
# The six steps, as they stand in the package.

# %%
source(type(model).forward, docstring=False)

# %% [markdown]
# One loop serves both kinds of block, because both take and return the two streams. The numbers are cast to the model's
# `dtype` *before* they are multiplied by 1000. In bf16 that rounds them: lesson 05.

# %%
source(type(model).__init__, docstring=False)

# %% [markdown]
# ## Shapes
#
# The stream keeps its shape through all 57 blocks: there is one kind of tensor, and no way down or up as in a U-Net.

# %% tags=["nbval-check-output"]
for name, recorded in (("miniature", t), ("FLUX.1-dev", dev)):
    shapes = {
        stream: {tuple(recorded[f"{block}/{stream}"].shape) for block in blocks}
        for stream in ("text", "image")
    }
    print(f"{name:10} shapes behind the 57 blocks: text {shapes['text']}, image {shapes['image']}")
assert {tuple(t[f"{block}/image"].shape) for block in blocks} == {(1, 64, 96)}
assert {tuple(dev[f"{block}/image"].shape) for block in blocks} == {(1, 4096, 3072)}

# %% [markdown]
# Two mistakes: position ids of another picture size, and a forgotten guidance scale.

# %% tags=["nbval-check-output"]
from flux_lab.shapes import ShapeError

for wrong in ({"img_ids": prepare_latent_image_ids(rows=4, columns=8)}, {"guidance": None}):
    try:
        model(**inputs | wrong)
    except (ShapeError, ValueError) as error:
        print(type(error).__name__, error, "", sep="\n")

# %% [markdown]
# ## Trust, then verify
#
# The reference is `FluxTransformer2DModel` of `diffusers`, loaded from the same file.

# %%
import diffusers

folder = flux_lab.data_dir() / "flux-mini"
reference = diffusers.FluxTransformer2DModel.from_pretrained(
    folder, subfolder="transformer", dtype=torch.float32
)
theirs = reference(**inputs, return_dict=False)[0]
difference = (model(**inputs) - theirs).abs().max().item()
print(
    f"largest difference of the velocity: {difference:.2g}, of numbers up to"
    f" {theirs.abs().max():.2f}"
)
assert difference < 1e-3

# %% [markdown]
# The end agrees. Does everything on the way? `compare.first_divergence` runs both models and compares every module's output,
# and every attention product, in the order of the run, up to rounding.

# %% tags=["nbval-check-output"]
result = compare.first_divergence(model, reference, inputs, rtol=1e-3, atol=1e-4)
print("every operation agrees:", not result)
assert not result

# %% [markdown]
# ### A planted bug
#
# Now we break our model in a way that happens easily: in the last layer, **scale** comes before **shift**, in all other
# norms shift comes first. Someone "tidies up":

# %%
import torch.nn.functional as F

from flux_lab.normalization import AdaLayerNormContinuous, modulate


class Tidied(AdaLayerNormContinuous):
    def forward(self, x, conditioning_embedding):
        shift, scale = self.linear(F.silu(conditioning_embedding)).chunk(2, dim=1)
        return modulate(self.norm(x), shift, scale)


broken = copy.deepcopy(model)
broken.norm_out.__class__ = Tidied
print(compare.first_divergence(broken, reference, inputs))

# %% [markdown]
# The report names the culprit, `norm_out`, the largest difference and where it stands, both values, and how much agreed
# before. No shape was wrong, so nothing raised. A second bug, deeper in: in block 7, the bias of the keys is 0.05 too large.

# %%
broken = copy.deepcopy(model)
broken.transformer_blocks[7].attn.to_k.bias.add_(0.05)
result = compare.first_divergence(broken, reference, inputs)
print(result)
assert result.name == "transformer_blocks.7.attn.to_k"

# %% [markdown]
# Found, among more than a thousand operations. Had we only looked at the velocity, we would know that *something* differs.
#
# ## Turn the knob
#
# ### Visit any of the 57 blocks
#
# `ablate` turns a block off: it hands both streams on as they came. First all blocks in one look: the one step from above
# without each of them, and the picture that its velocity aims at, $x_0 = x - \sigma v$, decoded.
#
# 57 passes are not needed. In front of the missing block all of them are equal to the whole pass. So **one growing batch**
# goes through the blocks. Its first row is the whole pass; behind each block a row joins it, the first row as it was
# *before* the block: a pass that lacks this block.


# %%
def without(name):
    """Turn one block off."""
    kind, index = name.split()
    return ablate(model, **{kind: int(index)})


def all_but_one():
    """Velocities: of the whole pass, then of the passes that lack one block."""
    text = model.context_embedder(inputs["encoder_hidden_states"])
    image = model.x_embedder(x)
    for block in named_blocks(model).values():
        before = text[:1], image[:1]
        around = {"temb": temb.expand(len(image), -1), "image_rotary_emb": rotation}
        after = block(hidden_states=image, encoder_hidden_states=text, **around)
        text, image = (torch.cat(streams) for streams in zip(after, before, strict=True))
    return model.proj_out(model.norm_out(image, temb.expand(len(image), -1)))


# %%
rows = all_but_one()
velocities = dict(zip(blocks, rows[1:].split(1), strict=True))
with without("single 20"):
    assert torch.allclose(velocities["single 20"], model(**inputs), atol=1e-3)
aims = pipe.decode(x - sigma * rows, 128, 128)
show(
    plots.block_sheet(dict(zip(["all blocks", *blocks], aims, strict=True))),
    alt="58 small pictures: what one step aims at with all blocks, and with each of the 57 blocks"
    " turned off.",
)

# %% [markdown]
# *What to see*: the first picture has all blocks; each of the others lacks the one in its title. A block adds only a part
# to the stream, and the blocks behind it go on without it. Look for the pictures that differ from the first.
#
# The same in numbers: by how much the velocity changes, and how wide the block's gates stand open.

# %%
change = {name: ((v - velocity).norm() / velocity.norm()).item() for name, v in velocities.items()}
opened = {
    name: torch.stack([t[gate].abs().mean() for gate in t.names(f"{name}/*gate")]).mean().item()
    for name in blocks
}
show(
    plots.block_bars(
        {"change of the velocity,\nits block turned off": change, "gates: mean of |gate|": opened}
    ),
    alt="Two rows of 57 bars: the change of the velocity when a block is off, and the mean size of"
    " its gates.",
)
order = sorted(change, key=change.get, reverse=True)
print("most missed: ", ", ".join(f"{name} ({change[name]:.3f})" for name in order[:4]))
print("least missed:", ", ".join(f"{name} ({change[name]:.3f})" for name in order[-4:]))

# %% [markdown]
# *What to see*: the longest bar of each row has its name. Most blocks with small gates change next to nothing, but
# not all: some of the first double blocks are missed more than their gates let expect. Wide gates alone do not make a
# block important: what it adds may be undone by the next.
#
# Now whole images. Choose a block; it is off in all 10 steps. Checks of shapes are off as well: in so small a model they
# take a quarter of the time.


# %%
def image_of(seed=0):
    with flux_lab.shapes.checks(enabled=False):
        return pipe(PROMPT, generator=seeded(seed), num_inference_steps=STEPS).images[0]


def visit(block="double 00", seed=0):
    with without(block):
        lacking = image_of(seed)
    complete = image_of(seed) if seed else full
    return plots.gallery([complete, lacking], ["all 57 blocks", f"without {block}"])


explore(
    visit,
    block=blocks,
    seed=(0, 20),
    alt="The image with all blocks, and without the first double-stream block.",
)

# %% [markdown]
# And many at once: a whole stretch of single-stream blocks.


# %%
def stretch(first=0, count=10):
    off = range(first, min(first + count, 38))
    with ablate(pipe, single=off):
        lacking = image_of()
    return plots.gallery([full, lacking], ["all 57 blocks", f"without single {first} to {off[-1]}"])


explore(
    stretch,
    first=(0, 37),
    count=(1, 38),
    alt="The image with all blocks, and without the first ten single-stream blocks.",
)

# %% [markdown]
# ## Break it
#
# Every block takes and gives the same shapes, so blocks can be put in any order and nothing raises an error. **Predict
# first**: what becomes of the image when the 38 single-stream blocks run backwards? When the first and the last of the
# double-stream blocks change places? When the words' vectors are zero?


# %%
def reordered(kind, order):
    changed = copy.deepcopy(pipe.transformer)
    blocks = getattr(changed, kind)
    setattr(changed, kind, torch.nn.ModuleList(blocks[index] for index in order))
    return changed


broken = {
    "single backwards": reordered("single_transformer_blocks", range(37, -1, -1)),
    "double 00 and 18 swapped": reordered("transformer_blocks", [18, *range(1, 18), 0]),
}
images = {"as trained": full}
for name, changed in broken.items():
    with instruments.seams.replaced(pipe, "transformer", changed):
        images[name] = image_of()
with ablate(pipe, t5=True):
    images["words' vectors zero"] = image_of()

# %%
changes = {
    name: (changed(**inputs) - velocity).norm() / velocity.norm()
    for name, changed in broken.items()
}
with ablate(model, t5=True):
    changes["words' vectors zero"] = (model(**inputs) - velocity).norm() / velocity.norm()
for name, value in changes.items():
    print(f"{name:26} change of the velocity {value:.3f}")
show(
    plots.gallery(list(images.values()), list(images)),
    alt="Four images: as trained, single-stream blocks backwards, two blocks swapped, no words.",
)

# %% [markdown]
# *What to see*: compare with the first image, and the numbers with the bars above. The numbers are of one step, on
# latents that the whole model has drawn; the images are of all ten. So the words' vectors at zero change that step
# little and still empty the picture. No error was raised in any of the three. A model that runs is not a model that
# is right: that is why the comparison with the reference goes down to every operation.
#
# ## Common misreadings
#
# **"The text comes out of the transformer as well."** It goes through all 57 blocks, but nobody reads it at the end. So
# what the *last* block does to the text has no effect at all. What earlier blocks do to it has: the attention of the blocks
# behind them reads it.

# %%
for block in ("single 00", "single 37"):
    with ablate(model, stream={block: "text"}):  # the text passes this block unchanged
        held = model(**inputs)
    print(
        f"text held in {block}: largest change of the velocity {(held - velocity).abs().max():.2g}"
    )
    if block == "single 37":
        assert torch.equal(held, model(**inputs))

# %% [markdown]
# **"schnell is a smaller model."** It is the same network, without the MLP for the guidance scale. It is faster because it
# takes fewer steps:

# %% tags=["nbval-check-output"]
sizes = {name: sum(count.values()) for name, count in counts.items()}
fewer = sizes["FLUX.1-dev"] - sizes["FLUX.1-schnell"]
width = FLUX_1_DEV.transformer.inner_dim
print(f"schnell has {fewer:,} parameters fewer: {100 * fewer / sizes['FLUX.1-dev']:.2f} %")
assert fewer == (256 * width + width) + (
    width * width + width
)  # two linear layers: 256 -> 3072 -> 3072

# %% [markdown]
# **"Twelve billion parameters work on every token."** The modulation, 27 % of them, works on one vector for each picture.
# It does not even see the latents: with the same prompt and the same steps it could be computed once and kept (lesson 14).

# %% tags=["nbval-check-output"]
modulation = [f"{kind}: modulation" for kind in ("double", "single")]
for name in ("FLUX.1-dev", "miniature"):
    share = [
        100 * sum(each[name][part] for part in modulation) / sum(each[name].values())
        for each in (counts, work)
    ]
    print(
        f"{name:10} modulation: {share[0]:.1f} % of the parameters, {share[1]:.3f} % of the FLOPs"
    )
other = inputs | {"hidden_states": pack_latents(prepare_noise(mini.shapes()["latents"], seeded(9)))}
with trace(model, only="*modulation/*") as again:
    model(**other)
print(
    "other latents, the same modulation:", all(torch.equal(again[name], t[name]) for name in again)
)

# %% [markdown]
# **"Attention is quadratic, so it is most of the work."** It depends on the size. Where do the two meet in FLUX.1-dev?

# %% tags=["nbval-check-output"]
for side in SIDES:
    print(
        f"{side:4} pixels: attention product"
        f" {100 * product[side] / (product[side] + rest[side]):4.1f} % of the FLOPs of a pass"
    )

# %% [markdown]
# ## Your turn
#
# ### Exercise 1: parameters of a double-stream block (medium, 15 minutes)
#
# Give the number of parameters of a double-stream block of width `dim` with heads of width `head_dim`. It has, for each of
# its two streams: a linear layer from the conditioning vector to the modulation signals; queries, keys, values and the
# output of attention; a norm for queries and one for keys, with a weight for each channel of a head; an MLP, four times as
# wide inside. Linear layers have biases.


# %% tags=["exercise"]
def double_block_parameters(dim, head_dim):
    """Parameters of a double-stream block."""
    raise NotImplementedError


# %%
from flux_lab.exercises import check

check("double_block_parameters", double_block_parameters)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A linear layer from `a` to `b` has `a * b + b` parameters. Write that as a function first.
#
# </details>
# <details><summary>Hint 2</summary>
#
# One stream: modulation from `dim` to `6 * dim`, four layers from `dim` to `dim`, an MLP from `dim` to `4 * dim` and back.
#
# </details>
# <details><summary>Hint 3</summary>
#
# The two norms of a stream have `2 * head_dim` weights and no biases. The layer norms have none. For FLUX.1-dev, with 3072
# and 128, you must get 339,831,296.
#
# </details>


# %% tags=["solution"]
def double_block_parameters(dim, head_dim):
    """Parameters of a double-stream block."""

    def linear(a, b):
        return a * b + b

    modulation = linear(dim, 6 * dim)
    attention = 4 * linear(dim, dim) + 2 * head_dim
    mlp = linear(dim, 4 * dim) + linear(4 * dim, dim)
    return 2 * (modulation + attention + mlp)


# %% [markdown]
# ### Exercise 2: work between the tokens (medium, 10 minutes)
#
# Give the FLOPs of the attention product in one block: queries times keys, then probabilities times values, all heads
# together. There are `tokens` image tokens and `length` text tokens; the model is `dim` wide. Leave out the softmax.


# %% tags=["exercise"]
def attention_product_flops(tokens, length, dim):
    """FLOPs of q k and of probabilities x values, in one block."""
    raise NotImplementedError


# %%
check("attention_product_flops", attention_product_flops)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# How long is the sequence that attends to itself?
#
# </details>
# <details><summary>Hint 2</summary>
#
# For one head: `[s, d]` times `[d, s]` takes $2 s d s$. The heads' widths add up to `dim`.
#
# </details>
# <details><summary>Hint 3</summary>
#
# The second product is as large as the first.
#
# </details>


# %% tags=["solution"]
def attention_product_flops(tokens, length, dim):
    """FLOPs of q k and of probabilities x values, in one block."""
    sequence = tokens + length
    return 2 * (2 * sequence * sequence * dim)


# %% [markdown]
# ### Exercise 3: the order of the pass (medium, 15 minutes)
#
# Run the blocks. `double` is a list of functions that take `(text, image)` and return both; `single` is a list of
# functions that take and return one sequence. All tensors are `[batch, tokens, channels]`. Return what goes to the last
# layer.


# %% tags=["exercise"]
def run_blocks(text, image, double, single):
    """The image stream behind the last block."""
    raise NotImplementedError


# %%
check("run_blocks", run_blocks)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Two loops, one after the other. Between them the two streams become one.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.cat([text, image], dim=1)`: text first.
#
# </details>
# <details><summary>Hint 3</summary>
#
# The last layer takes the image tokens only: all from `text.shape[1]` on.
#
# </details>


# %% tags=["solution"]
def run_blocks(text, image, double, single):
    """The image stream behind the last block."""
    for block in double:
        text, image = block(text, image)
    sequence = torch.cat([text, image], dim=1)
    for block in single:
        sequence = block(sequence)
    return sequence[:, text.shape[1] :]


# %% [markdown]
# ## Recap
#
# 1. A pass has six steps: embed latents and words, make the conditioning vector, make the rotations, 19 double-stream
#    blocks, 38 single-stream blocks, last norm and projection of the image tokens.
# 2. Every block adds to streams whose shapes never change. So any block can be turned off, and a wrong order raises no
#    error.
# 3. FLUX.1-dev: 11.9 billion parameters, 74 TFLOP a pass at 1024 pixels. The modulation has 27 % of the parameters and
#    next to no work; the attention product has work and no parameters.
# 4. schnell is the same network without the guidance MLP. What makes it fast is the number of steps.
# 5. `first_divergence` finds the first operation that differs from the reference; without a bug there is none.
#
# **Next**: lesson 09 picks up the velocity, `[1, 64, 64]` (FLUX.1-dev: `[1, 4096, 64]`), and asks how far to follow it.
