# %% [markdown]
# # 02 · Text encoders: from ids to vectors
#
# After this lesson you can
#
# - write the attention of CLIP and that of T5, and name each place where they differ;
# - say which of their vectors FLUX.1 uses, and measure which words each of them knows;
# - give the two encoders different prompts, ask for several images, and tell what padding does.
#
# **Time**: half a minute to run, 60 minutes to study. **You need**: lesson 01 (ids, padding), and to have heard of
# attention. Nothing of the other lessons' variables is used.

# %%
import numpy as np
import torch
import torch.nn.functional as F

import flux_lab
from flux_lab import instruments
from flux_lab.clip import CLIPAttend, quick_gelu
from flux_lab.instruments import FLUX_1_DEV, Table, explore, plots, show, source
from flux_lab.t5 import T5Attend, gelu_new, relative_position_bucket

torch.set_grad_enabled(False)
pipe = flux_lab.load_mini()
pipe.set_progress_bar_config(disable=True)
clip, clip_encoder, t5, t5_encoder = (
    pipe.tokenizer,
    pipe.text_encoder,
    pipe.tokenizer_2,
    pipe.text_encoder_2,
)
mini = instruments.anatomy_of(pipe)  # its sizes

# %% [markdown]
# ## You are here

# %%
show(
    plots.pipeline_map("text_encoders"),
    alt="Map of the pipeline with the two text encoders lit: ids go in. CLIP gives one vector, T5"
    " one vector for each token.",
)

# %% [markdown]
# *What to see*: two ways out of the text, to two places. CLIP's one vector joins the conditioning: it is mixed with
# the noise level. T5's vectors enter the blocks as tokens, side by side with the image.
#
# ## The idea
#
# An id says nothing by itself: 12 is no more like 13 than like 500. A **text encoder** gives each id a learned vector,
# and then lets the vectors tell one another what they stand next to. `red` alone becomes `red, of the sphere`.
#
# Both encoders are stacks of **layers**. Every layer reads the vectors $x$, with shape `[batch, length, width]`, and
# adds to them, twice. A **norm** first brings each vector to a fixed size:
#
# $$x \leftarrow x + \text{attention}(\text{norm}(x)), \qquad x \leftarrow x + \text{MLP}(\text{norm}(x)).$$
#
# The MLP works on each vector alone. **Attention** moves information between tokens. Linear maps make of each vector
# several **heads**, each with a query, a key and a value of $d$ numbers. All queries of a head are $Q$, `[length, d]`;
# keys are $K$, values $V$:
#
# $$\text{attention} = \text{softmax}\big(s \, Q K^\top + B\big)\, V.$$
#
# $QK^\top$, `[length, length]`, holds a **score** for each query (row) and key (column). The softmax turns each row into
# weights that sum to 1. The two encoders differ in nearly everything else:
#
# | | CLIP | T5 |
# |---|---|---|
# | scale $s$ | $1/\sqrt d$ | 1: no scaling |
# | added to the scores, $B$ | $-\infty$ for keys behind the query: **causal mask** | a learned number for each distance |
# | place of a token | a learned vector for each place, added to the ids' | only through $B$ |
# | norm | LayerNorm: mean 0, variance 1 | RMSNorm: mean square 1 |
# | MLP | quick_gelu | gated, with gelu_new |
# | FLUX.1 uses | one vector, at the end token | all vectors |

# %% tags=["nbval-check-output"]
rows = []
for name, part in (("CLIP", "text_encoder"), ("T5", "text_encoder_2")):
    for anatomy in (mini, FLUX_1_DEV):
        config = getattr(anatomy, part)
        layers, heads = (
            (config.num_hidden_layers, config.num_attention_heads)
            if name == "CLIP"
            else (config.num_layers, config.num_heads)
        )
        width = config.hidden_size if name == "CLIP" else config.d_model
        rows.append(
            [name, anatomy.name, layers, width, heads, instruments.parameter_counts(anatomy)[part]]
        )
print(Table(["encoder", "model", "layers", "width", "heads", "parameters"], rows))

# %% [markdown]
# ## CLIP, layer by layer
#
# CLIP was trained to put a picture and its caption at the same place in one space of vectors (Radford et al. 2021). Each
# text had to fit into *one* vector. That is the vector FLUX.1 takes.

# %% tags=["nbval-check-output"]
PROMPT = "a large shiny red sphere to the left of a small matte blue cube on a wooden floor"
clip_ids, t5_ids = clip(PROMPT), t5(PROMPT)
token, place = clip_encoder.embeddings.token_embedding, clip_encoder.embeddings.position_embedding
x = token(clip_ids) + place(torch.arange(77))
assert torch.equal(x, clip_encoder.embeddings(clip_ids))
print(
    "table of ids   ",
    list(token.weight.shape),
    " FLUX.1-dev",
    [FLUX_1_DEV.text_encoder.vocab_size, FLUX_1_DEV.text_encoder.hidden_size],
)
print(
    "table of places",
    list(place.weight.shape),
    "   FLUX.1-dev",
    [77, FLUX_1_DEV.text_encoder.hidden_size],
)
print("their sum      ", list(x.shape))

# %% [markdown]
# A row of each table, added: the id's vector and the place's vector. There are 77 places, so CLIP cannot read a
# 78th token.
#
# ### The causal mask
#
# Hooks let us look at the weights of every layer and head, in both encoders:


# %%
def attention_weights(encoder, ids):
    """The weights of every layer, [layers, heads, query, key]."""
    found = []
    attends = [module for module in encoder.modules() if isinstance(module, CLIPAttend | T5Attend)]

    def look(module, given, result):
        queries, keys, _, *bias = given
        found.append(module.probabilities(queries, keys, *bias)[0])

    hooks = [module.register_forward_hook(look) for module in attends]
    encoder(ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


# %%
short = "a red sphere left of a blue cube"
clip_pieces = [piece.removesuffix("</w>") for piece in clip.explain(short).pieces]
count = len(clip_pieces)
clip_weights = attention_weights(clip_encoder, clip(short))
axes = {"xlabel": "key: the token that is looked at", "ylabel": "query: the token that looks"}
show(
    plots.labelled_map(
        clip_weights[0].mean(0)[:count, :count],
        clip_pieces,
        clip_pieces,
        **axes,
        label="weight, mean of the heads",
        digits=2,
    ),
    alt="CLIP's attention weights in the first layer: a lower triangle. All weights above the"
    " diagonal are zero.",
)
assert clip_weights.triu(1).abs().max() == 0

# %% [markdown]
# *What to see*: a triangle. Each row sums to 1, and everything right of the diagonal is exactly zero: a token sees
# itself and what stands *before* it. The start token can only look at itself. The end token, in the last row, is the
# first to see the whole prompt. That is why it is the one to keep.
#
# What this means: change one word, and see which vectors move. We measure the distance to the old vector as a share of
# its length.


# %%
def movement(before, after):
    """How far each vector moved, as a share of its length."""
    return (after - before).norm(dim=-1) / before.norm(dim=-1)


other = short.replace("sphere", "cone")
clip_moved = movement(
    clip_encoder(clip(short)).last_hidden_state, clip_encoder(clip(other)).last_hidden_state
)[0]
t5_moved = movement(t5_encoder(t5(short)), t5_encoder(t5(other)))[0]
assert clip_moved[:3].max() < 1e-6
assert t5_moved.min() > 0

# %%
places, no_start = torch.arange(count - 1), torch.tensor([float("nan")])
moved = {"CLIP": clip_moved[places], "T5": torch.cat([no_start, t5_moved[: count - 2]])}
show(
    plots.curves(
        places,
        moved,
        xlabel="place in CLIP's sequence (at 3 sphere becomes cone)",
        ylabel="movement (share)",
        step=True,
    ),
    alt="Movement of each token's vector when sphere becomes cone: CLIP's are zero before the word,"
    " T5's move everywhere.",
)

# %% [markdown]
# *What to see*: in CLIP nothing moves before the changed word. In T5 (which has no start token, so its curve begins at
# place 1) each vector moves, also those in front of the word: it reads in both directions.
#
# ### quick_gelu
#
# Between the two linear maps of its MLP, CLIP has $\text{quick\_gelu}(x) = x \cdot \text{sigmoid}(1.702\, x)$, an
# approximation of $\text{GELU}(x) = x \cdot \Phi(x)$. $\Phi(x)$ is the share of a normal distribution that lies
# below $x$.

# %%
x = torch.linspace(-4, 4, 161)
difference = {
    "quick_gelu − GELU": quick_gelu(x) - F.gelu(x),
    "gelu_new − GELU": gelu_new(x) - F.gelu(x),
}
show(
    plots.curves(
        x,
        {"quick_gelu (CLIP)": quick_gelu(x), "GELU": F.gelu(x), "ReLU": F.relu(x)},
        xlabel="x",
        ylabel="activation",
    ),
    alt="quick_gelu and GELU against x: nearly one curve, zero far left, x far right, slightly"
    " below zero between.",
)
show(
    plots.curves(x, difference, xlabel="x", ylabel="difference to GELU"),
    alt="Difference to the exact GELU: quick_gelu is off by up to 0.02, gelu_new by less than a"
    " thousandth.",
)

# %% [markdown]
# *What to see*: above, two curves that look like one. Below, their difference: 0.02 at most. It was cheaper to compute
# once. Weights trained with one approximation want that one: through 12 layers the small differences add up.
#
# ### The pooled end token
#
# **Pooling** makes one vector of many. CLIP takes the vector at the first end token. The reference finds it in a
# curious way: FLUX.1's configuration says `eos_token_id` 2, which was an error of the first release. For this value the
# code takes the *highest id* instead, and the end token has the highest id of the vocabulary.

# %% tags=["nbval-check-output"]
output = clip_encoder(clip_ids)
at = int(clip_ids.argmax(-1))
assert torch.equal(output.pooler_output, output.last_hidden_state[:, at])
print(
    "end token:",
    clip.eos_token_id,
    "at place",
    at,
    "; eos_token_id of the configuration:",
    clip_encoder.config.eos_token_id,
)
print(
    "all vectors",
    list(output.last_hidden_state.shape),
    "-> pooled",
    list(output.pooler_output.shape),
)
junk = clip_ids.clone()
junk[:, at + 1 :] = torch.arange(3, 3 + 76 - at)  # other tokens in place of the padding
torch.testing.assert_close(clip_encoder(junk).pooler_output, output.pooler_output)
print("with other tokens behind the end token: the same vector")

# %% [markdown]
# So CLIP needs no mask for its padding. It stands behind the end token, and the end token cannot see it.
#
# ## T5, layer by layer
#
# T5 was trained to fill gaps in texts (Raffel et al. 2020). FLUX.1 takes its first half, the encoder. Each token keeps its
# own vector.
#
# ### Where is the order of the words?
#
# T5 adds nothing to the ids' vectors. Instead a learned number is added to each score. It depends on the **distance**
# only: place of the key minus place of the query. Distances are put into 32 **buckets**, in both models:

# %%
distances = torch.arange(-140, 141)
show(
    plots.curves(
        distances,
        {"bucket": relative_position_bucket(distances)},
        xlabel="distance: key minus query (tokens)",
        ylabel="bucket",
        step=True,
    ),
    alt="Bucket against distance: for each side, eight exact steps near zero, then wider and wider"
    " ones; beyond 90 the curve is flat.",
)

# %% tags=["nbval-check-output"]
near = torch.arange(-10, 11)
print("distance", near.tolist())
print("bucket  ", relative_position_bucket(near).tolist())

# %% [markdown]
# *What to see*: up to a distance of 7 every step has its own bucket, on each side. Farther away the buckets grow: the
# model tells 2 from 3, but not 100 from 101. The last bucket takes all from 91 on. The query itself and keys before it
# have buckets 0 to 15, keys behind it 17 to 31. Bucket 16 is never used.
#
# Each head has one number a bucket, so the whole table has 32 × heads numbers. Only the first layer owns it; all layers
# use it.

# %%
first = t5_encoder.encoder.block[0].layer[0].SelfAttention
bias = first.compute_bias(32)
show(
    plots.position_bias(bias),
    alt="T5's position bias, one map for each of four heads: stripes along the diagonals, because"
    " only the distance counts.",
)

# %%
middle = {f"head {head}": bias[0, head, 16] for head in range(bias.shape[1])}
show(
    plots.curves(
        torch.arange(-16, 16),
        middle,
        xlabel="distance: key minus query (tokens)",
        ylabel="added to the score",
        step=True,
    ),
    alt="The same numbers against distance, a curve for each head.",
)
for head, values in enumerate(bias[0, :, 16]):
    print(
        f"head {head}: highest at distance {int(values.argmax()) - 16:+}, lowest at"
        f" {int(values.argmin()) - 16:+}"
    )

# %% [markdown]
# *What to see*: stripes. Along a diagonal the distance is the same, so the colour is the same. The curves are one row of
# each map. Where a curve is high, the head likes to look: at +6, six tokens further on. Heads differ in this, and so
# they can look at different neighbours.
#
# ### No scaling
#
# A score is a sum of $d$ products, so it grows with $\sqrt d$. Others divide by $\sqrt d$. T5 does not: it starts its
# training with queries that are smaller by that factor, and lets them grow as needed.

# %%
torch.manual_seed(0)
fresh = type(t5_encoder)(t5_encoder.config).encoder.block[0].layer[0].SelfAttention
for name, layer in (("at the start of training", fresh), ("now", first)):
    ratio = layer.q.weight.std() / layer.k.weight.std()
    print(f"{name:24} size of the query weights / size of the key weights: {ratio:.3f}")
print(
    f"1 / sqrt(head width): miniature {mini.text_encoder_2.d_kv**-0.5:.3f}, FLUX.1-dev"
    f" {FLUX_1_DEV.text_encoder_2.d_kv**-0.5:.3f}"
)

# %% [markdown]
# What if we divide anyway? A row of weights can be read as a number: how many tokens it is spread over. It is
# $\exp(\text{entropy})$: 1 if all weight is on one token, 32 if it is equal on all.


# %%
def spread(scale):
    """Tokens that a row of weights is spread over, for each layer."""
    found = []

    def look(module, given, result):
        queries, keys, _, bias = given
        weights = (scale * queries @ keys.mT + bias).softmax(-1)
        found.append(torch.special.entr(weights).sum(-1).exp().mean().item())

    hooks = [
        block.layer[0].SelfAttention.attend.register_forward_hook(look)
        for block in t5_encoder.encoder.block
    ]
    t5_encoder(t5_ids)
    for hook in hooks:
        hook.remove()
    return {f"layer {index}": value for index, value in enumerate(found)}


# %%
root = mini.text_encoder_2.d_kv**-0.5
series = {"as trained, s = 1": spread(1.0), "divided by √d": spread(root)}
show(
    plots.grouped_bars(series, xlabel="tokens that the attention is spread over (of 32)", digits=1),
    alt="Spread of T5's attention in each layer, as trained and with the scores divided by the root"
    " of the head width.",
)

# %% [markdown]
# *What to see*: compare the two bars of a layer. Smaller scores make flatter weights, so a query can no longer pick
# its token out.
#
# ### The norm and the MLP
#
# Both by hand. RMSNorm divides by the root of the mean square. The **gated** MLP has two linear maps side by side; one,
# behind GELU, is the gate of the other.

# %%
x = t5_encoder.shared(t5_ids)
attention_layer, mlp_layer = t5_encoder.encoder.block[0].layer
norm, mlp = attention_layer.layer_norm, mlp_layer.DenseReluDense
normed = norm.weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
torch.testing.assert_close(normed, norm(x))
gate, value = gelu_new(normed @ mlp.wi_0.weight.mT), normed @ mlp.wi_1.weight.mT
torch.testing.assert_close((gate * value) @ mlp.wo.weight.mT, mlp(normed))
steps = {"ids": t5_ids, "vectors": x, "gate and value": gate, "back": mlp(normed)}
print(" -> ".join(f"{name} {list(tensor.shape)}" for name, tensor in steps.items()))
for anatomy in (mini, FLUX_1_DEV):
    print(f"{anatomy.name:10} width inside the MLP: {anatomy.text_encoder_2.d_ff}")

# %% [markdown]
# ## Which words does each vector know?
#
# The two encoders have read the same prompt. What is left of each word in their vectors? We change one word at a time
# and measure how far the vectors go. A distance needs a measure: 1 is the mean distance between two unrelated prompts,
# for T5 between two unrelated tokens.

# %%
from flux_lab.training.captions import standard
from flux_lab.training.world import sample_scene

rng = np.random.default_rng(0)
scenes = [sample_scene(rng, 2) for _ in range(900)]
texts = [standard(scene) for scene in scenes]
print(*texts[:3], sep="\n")
pooled, words = clip_encoder(clip(texts)).pooler_output, t5_encoder(t5(texts))
clip_unit = torch.pdist(pooled[:200]).mean()
tokens = words[:200, :18].flatten(0, 1)[::7]  # every 7th, from all places
t5_unit = torch.pdist(tokens).mean()

# %%
CHANGES = (
    *("large small", "shiny matte", "red green", "sphere cone", "left right"),
    *("small large", "matte shiny", "blue yellow", "cube cylinder", "wooden grassy"),
)
changes = [change.split() for change in CHANGES]
changed = [PROMPT.replace(old, new, 1) for old, new in changes]
names = [f"{old} → {new}" for old, new in changes]
assert all(len(t5.encode(each)) == len(t5.encode(PROMPT)) for each in changed)

# %%
vector = clip_encoder(clip_ids).pooler_output
moved = (clip_encoder(clip(changed)).pooler_output - vector).norm(dim=-1) / clip_unit
bars = {"CLIP's pooled vector": dict(zip(names, moved.tolist(), strict=True))}
show(
    plots.grouped_bars(bars, xlabel="movement (1 = an unrelated prompt)", digits=2),
    alt="How far CLIP's pooled vector moves for each of ten changed words: far for colours, hardly"
    " for left and right.",
)
print(f"most: {names[moved.argmax()]}; least: {names[moved.argmin()]}")

# %% [markdown]
# *What to see*: one number for each change, because all words share one vector. CLIP was trained to tell pictures apart.
# Colours, sizes and the floor fill many pixels, and move the vector far. `left → right` hardly moves it.

# %%
t5_pieces = [piece.removeprefix("▁") for piece in t5.explain(PROMPT).pieces]
moved = (t5_encoder(t5(changed)) - t5_encoder(t5_ids)).norm(dim=-1)[:, : len(t5_pieces)] / t5_unit
labels = {
    "xlabel": "token",
    "ylabel": "change of one word",
    "label": "movement (1 = an unrelated token)",
}
show(
    plots.labelled_map(moved, names, t5_pieces, **labels, digits=1),
    alt="How far each of T5's vectors moves for each changed word: far at the word itself, a little"
    " at the others.",
)

# %% [markdown]
# *What to see*: the darkest cell of each row is the changed word itself. `left → right`, which
# hardly moved CLIP, is as dark as the others. And the rest of a row is not zero: the other words have heard of the change, a little.
#
# ### Same words, other meaning
#
# "A red sphere and a blue cube" has the words of "a blue sphere and a red cube". Which colour belongs to which thing is
# called **binding**. Does the vector know?

# %%
base = "a red sphere to the left of a blue cube"
variants = {
    "colours swapped": "a blue sphere to the left of a red cube",
    "shapes swapped": "a red cube to the left of a blue sphere",
    "right for left": "a red sphere to the right of a blue cube",
    "sentence turned around": "a blue cube to the right of a red sphere",
    "ball for sphere": "a red ball to the left of a blue cube",
    "green for red": "a green sphere to the left of a blue cube",
}
start = clip_encoder(clip(base)).pooler_output
distance = {
    name: ((clip_encoder(clip(text)).pooler_output - start).norm() / clip_unit).item()
    for name, text in variants.items()
}
show(
    plots.grouped_bars(
        {"CLIP's pooled vector": distance}, xlabel="movement (1 = an unrelated prompt)", digits=2
    ),
    alt="Movement of the pooled vector for six variants of one sentence, among them swapped colours"
    " and a synonym.",
)

# %% [markdown]
# *What to see*: a new colour moves the vector far, an exchange of words moves it little. CLIP knows well *which* words there
# are, and only faintly which belongs to which. Two of the variants mean the *same* scene as before: the synonym, and the
# sentence turned around. The synonym stays near. The turned sentence moves as far as the swapped colours, which mean
# another scene: to this vector the order of the words counts, not the meaning.
#
# ### Reading the vectors
#
# A small movement may still be a clear signal. So the sharpest question is: can an attribute be *read* from a vector? We
# fit a linear map on 600 prompts and test it on 300 others. What a linear map can read, the first layer of FLUX.1's
# transformer can read too.


# %%
def readable(vectors, labels, train=600):
    """Share of the labels that a linear map reads from vectors which it was not fitted on."""
    names = sorted(set(labels))
    target = torch.tensor([names.index(label) for label in labels])
    x = torch.cat([vectors, torch.ones(len(vectors), 1)], dim=1).double()
    fitted = torch.linalg.lstsq(x[:train], F.one_hot(target[:train]).double()).solution
    return 100 * ((x[train:] @ fitted).argmax(-1) == target[train:]).double().mean().item()


shapes = {t5.vocab[f"▁{shape}"] for shape in ("sphere", "cube", "cylinder", "cone")}
nouns = torch.tensor(
    [[place for place, index in enumerate(t5.encode(text)) if index in shapes] for text in texts]
)
rows = torch.arange(len(texts))
vectors = {
    "CLIP, pooled": pooled,
    "T5, first noun": words[rows, nouns[:, 0]],
    "T5, second noun": words[rows, nouns[:, 1]],
}

# %%
labels = {
    "relation": [scene.relation for scene in scenes],
    "floor": [scene.floor for scene in scenes],
}
for number, place in enumerate(("first", "second")):
    for attribute in ("color", "shape"):
        labels[f"{place} object: {attribute}"] = [
            getattr(scene.objects[number], attribute) for scene in scenes
        ]
shares = {
    name: {label: readable(each, values) for label, values in labels.items()}
    for name, each in vectors.items()
}
shares["guessing"] = {label: 100 / len(set(values)) for label, values in labels.items()}

# %%
show(
    plots.grouped_bars(shares, xlabel="read correctly (% of 300 prompts)"),
    alt="Share of six attributes that a linear map reads from CLIP's pooled vector and from T5's"
    " vectors at two nouns, beside guessing.",
)
for name in vectors:
    best, worst = (max(labels, key=shares[name].get), min(labels, key=shares[name].get))
    print(
        f"{name:15} best: {best} {shares[name][best]:.0f} %, worst: {worst}"
        f" {shares[name][worst]:.0f} %"
    )

# %% [markdown]
# *What to see*: CLIP's vector, in blue, is good at colours and the floor, weak at shapes and the relation. From T5's
# vector of *one* noun nearly all can be read with few errors, the other object's attributes too; the floor is the
# hardest. Attention has carried the sentence into each word. The small movements above were clear signals.
#
# ## What the pipeline takes
#
# `encode_prompt` does both, and adds the text's **position ids**, all zero (lesson 04).

# %% tags=["nbval-check-output"]
text = pipe.encode_prompt(PROMPT)
for name, tensor in zip(("prompt_embeds", "pooled_prompt_embeds", "text_ids"), text, strict=True):
    there = FLUX_1_DEV.shapes().get(name, (FLUX_1_DEV.length, 3))
    print(f"{name:21} miniature {list(tensor.shape)!s:13} FLUX.1-dev {list(there)}")
assert torch.equal(text.prompt_embeds, t5_encoder(t5_ids))
assert torch.equal(text.pooled_prompt_embeds, clip_encoder(clip_ids).pooler_output)
assert text.text_ids.abs().max() == 0

# %% [markdown]
# ### prompt and prompt_2
#
# The two encoders may be given different texts: `prompt` goes to CLIP, `prompt_2` to T5. Without `prompt_2` both read
# `prompt`. What if they disagree?

# %%
ONE, TWO = "a large red sphere on a grassy floor", "a large blue cube on a sandy floor"
mixed = pipe.encode_prompt(ONE, prompt_2=TWO)
assert torch.equal(mixed.pooled_prompt_embeds, pipe.encode_prompt(ONE).pooled_prompt_embeds)
assert torch.equal(mixed.prompt_embeds, pipe.encode_prompt(TWO).prompt_embeds)
noise = [torch.Generator().manual_seed(1) for _ in range(4)]
images = pipe(
    [ONE, ONE, TWO, TWO], prompt_2=[ONE, TWO, ONE, TWO], num_inference_steps=14, generator=noise
).images
titles = ["CLIP: red sphere, grass\nT5: the same", "CLIP: red sphere, grass\nT5: blue cube, sand"]
titles += ["CLIP: blue cube, sand\nT5: red sphere, grass", "CLIP: blue cube, sand\nT5: the same"]
show(
    plots.gallery(images, titles),
    alt="Four images of one seed: both encoders read the same prompt, or two prompts that"
    " disagree.",
)

# %% [markdown]
# *What to see*: in the outer two, both encoders read the same. Compare the inner two with them: does the picture
# follow CLIP's prompt or T5's, for the floor, the colour, the shape? You saw that one vector can hold most of a
# caption of this small world. Whether the network listens to it is another question. A long prompt for FLUX.1-dev has
# more to say. Lesson 10 measures the conflict.
#
# ### num_images_per_prompt
#
# Several images of one prompt need the text only once. The vectors are repeated, the copies next to each other:

# %% tags=["nbval-check-output"]
several = pipe.encode_prompt([ONE, TWO], num_images_per_prompt=3)
print(list(several.prompt_embeds.shape), list(several.pooled_prompt_embeds.shape))
same = [
    [int(torch.equal(first, second)) for second in several.pooled_prompt_embeds]
    for first in several.pooled_prompt_embeds
]
print(*same, sep="\n")
assert several.prompt_embeds.shape == (6, 32, 128)

# %% [markdown]
# A 1 means: the same vector. Rows 0 to 2 are the first prompt, rows 3 to 5 the second. The seeds follow the same order.
#
# ## The real code
#
# The attention of CLIP and of T5, and the bucket of a distance:

# %%
source(CLIPAttend)

# %%
source(T5Attend)

# %%
source(relative_position_bucket)

# %% [markdown]
# Read `is_causal=True` in the first, `scale=1.0` in the second. And `encode_prompt`, which puts it all together:

# %%
from flux_lab.prompt import encode_prompt

source(encode_prompt, docstring=False)

# %% [markdown]
# ## Shapes
#
# FLUX.1-dev's own encoders, on the `meta` device:

# %% tags=["nbval-check-output"]
shapes_dev = FLUX_1_DEV.shapes()
big_clip, big_t5 = (
    instruments.on_meta(part, FLUX_1_DEV) for part in ("text_encoder", "text_encoder_2")
)
one = big_clip(torch.zeros(shapes_dev["clip_ids"], dtype=torch.int64, device="meta"))
many = big_t5(torch.zeros(shapes_dev["t5_ids"], dtype=torch.int64, device="meta"))
assert (output.pooler_output.shape, one.pooler_output.shape) == ((1, 64), (1, 768))
assert (t5_encoder(t5_ids).shape, many.shape) == ((1, 32, 128), (1, 512, 4096))
print(
    "CLIP: miniature", list(output.pooler_output.shape), "FLUX.1-dev", list(one.pooler_output.shape)
)
print("T5:   miniature", list(t5_encoder(t5_ids).shape), "FLUX.1-dev", list(many.shape))

# %% [markdown]
# Now a wrong shape. Embeddings may be given in place of a prompt; here CLIP's vector has lost its axis `batch`:

# %% tags=["nbval-check-output"]
from flux_lab.shapes import ShapeError

try:
    pipe.encode_prompt(
        prompt_embeds=text.prompt_embeds, pooled_prompt_embeds=text.pooled_prompt_embeds[0]
    )
except ShapeError as error:
    print(error)

# %% [markdown]
# ## Trust, then verify
#
# The reference is `transformers`. It reads the same weights.

# %%
import transformers

transformers.utils.logging.disable_progress_bar()
folder = flux_lab.data_dir() / "flux-mini"
their_clip = transformers.CLIPTextModel.from_pretrained(
    folder / "text_encoder", dtype=torch.float32
)
their_t5 = transformers.T5EncoderModel.from_pretrained(
    folder / "text_encoder_2", dtype=torch.float32
)
batch = [PROMPT, short, "", "une sphère rouge", *texts[:60]]
differences = {
    "CLIP, all vectors": clip_encoder(clip(batch)).last_hidden_state
    - their_clip(clip(batch)).last_hidden_state,
    "CLIP, pooled": clip_encoder(clip(batch)).pooler_output - their_clip(clip(batch)).pooler_output,
    "T5": t5_encoder(t5(batch)) - their_t5(t5(batch)).last_hidden_state,
}

# %% tags=["nbval-check-output"]
for name, difference in differences.items():
    assert difference.abs().max() < 2e-5
    print(
        f"{name:18} {list(difference.shape)!s:14} largest difference below 0.00002:"
        f" {bool(difference.abs().max() < 2e-5)}"
    )

# %%
print({name: f"{difference.abs().max():.1e}" for name, difference in differences.items()})

# %% [markdown]
# ## Turn the knob
#
# Look around in the attention. Which head looks one word back? Which looks at the word itself? (The columns of T5's padding
# are left out, so its rows sum to less than 1.)


# %%
def look_around(prompt=short, encoder="T5", layer=1, head=0):
    tokenizer, model = (t5, t5_encoder) if encoder == "T5" else (clip, clip_encoder)
    cut = tokenizer.explain(prompt).pieces[:14]
    pieces = [piece.strip("▁").removesuffix("</w>") or "▁" for piece in cut]
    weights = attention_weights(model, tokenizer(prompt))[layer, head, : len(pieces), : len(pieces)]
    return plots.labelled_map(
        weights, pieces, pieces, **axes, label=f"weight, layer {layer}, head {head}", digits=2
    )


explore(
    look_around,
    prompt=str,
    encoder=["T5", "CLIP"],
    layer=(0, 3),
    head=(0, 3),
    alt="Attention weights of T5, layer 1, head 0: a row for every token that looks, a column for"
    " every token looked at.",
)

# %% [markdown]
# Two prompts of your own: how far do they move the vectors?


# %%
def compare(prompt="a small red cone on a dark floor", other="a small teal cone on a dark floor"):
    before, after = (t5_encoder(t5(text)) for text in (prompt, other))
    length = max(len(t5.encode(text)) for text in (prompt, other))
    pieces = t5.pieces_of(t5(other)[0, : min(length, 20)])
    pooled = (
        clip_encoder(clip(prompt)).pooler_output - clip_encoder(clip(other)).pooler_output
    ).norm() / clip_unit
    moved = (after - before).norm(dim=-1)[0] / t5_unit
    bars = {"CLIP, pooled": pooled.item()} | {
        f"T5, {place}: {piece}": moved[place].item() for place, piece in enumerate(pieces)
    }
    return plots.grouped_bars({"movement": bars}, "movement (1 = unrelated)", digits=2)


explore(
    compare,
    prompt=str,
    other=str,
    alt="Movement of each T5 vector and of CLIP's vector when red becomes teal.",
)

# %% [markdown]
# ## Break it
#
# **Predict first**: we set T5's position bias to zero. Nothing else in T5 knows a place. Two prompts with the same
# words, "a red sphere left of a blue cube" and "a blue sphere left of a red cube": how different are the vectors of
# `sphere` in the two, before and after?


# %%
def sphere_moves():
    one, two = (
        t5_encoder(t5(f"a {colors[0]} sphere left of a {colors[1]} cube"))
        for colors in (("red", "blue"), ("blue", "red"))
    )
    return (movement(one, two)[0, 2]).item()


table = first.relative_attention_bias.weight
saved = table.clone()
broken = {"with the position bias": sphere_moves()}
table.zero_()
broken["without"] = sphere_moves()
table.copy_(saved)
print({name: f"{value:.6f}" for name, value in broken.items()})
assert broken["without"] < 1e-4 < broken["with the position bias"]

# %% [markdown]
# Without the bias the sphere cannot know which colour is its own: a sum over all tokens is the same in any order. T5 has
# become a **bag of words**. All that T5 knows of order sits in 32 numbers a head.
#
# And CLIP with the wrong slot: what if we pool the last of the 77, as if it were the end?

# %%
hidden = clip_encoder(clip(texts[:300])).last_hidden_state
pooled_at = {
    "end token": pooled[:300],
    "first slot": hidden[:, 0],
    "last slot (padding)": hidden[:, -1],
}
for name, each in pooled_at.items():
    print(
        f"{name:20} mean distance between two prompts: {torch.pdist(each).mean() / clip_unit:.2f}"
    )
assert torch.pdist(pooled_at["first slot"]).max() < 1e-4

# %% [markdown]
# The first slot is the same for *all* prompts: the start token sees only itself. The last slot has seen the prompt, but
# nobody trained it to say anything.
#
# ## Common misreadings
#
# **"Attention ignores the padding."** It does not. Neither T5 nor FLUX.1's transformer gets a mask. How much of their
# attention do the words of the prompt give to padding, in T5?

# %%
weights = attention_weights(t5_encoder, t5_ids)
count = len(t5.encode(PROMPT))
share = 100 * weights[:, :, :count, count:].sum(-1).mean((1, 2))
show(
    plots.grouped_bars(
        {"to the padding": {f"layer {index}": value for index, value in enumerate(share.tolist())}},
        "attention of the words (%)",
        digits=1,
    ),
    alt="Share of the words' attention that goes to padding in each layer of T5: above zero in"
    " each.",
)
assert share.min() > 0

# %% [markdown]
# Does it change the result? We take the padding away: the same prompt with just as many slots as it needs.

# %%
exact = pipe.encode_prompt(PROMPT, max_sequence_length=count).prompt_embeds
padded = t5_encoder(t5_ids)[:, :count]
print(f"movement of the words' vectors without padding: {movement(padded, exact).mean():.3f}")
assert movement(padded, exact).min() > 0

# %% [markdown]
# And in the transformer: one velocity from pure noise (lesson 00), with a part of the text set to zero.

# %%
from flux_lab.latents import pack_latents, prepare_latent_image_ids, prepare_noise

tokens = pack_latents(prepare_noise(mini.shapes()["latents"], torch.Generator().manual_seed(0)))
fixed = {
    "timestep": torch.ones(1),
    "guidance": torch.tensor([3.5]),
    "img_ids": prepare_latent_image_ids(8, 8),
    "txt_ids": text.text_ids,
}


def velocity(words=text.prompt_embeds, pooled=text.pooled_prompt_embeds):
    return pipe.transformer(
        hidden_states=tokens, encoder_hidden_states=words, pooled_projections=pooled, **fixed
    )


# %%
is_padding = (t5_ids == t5.pad_token_id).unsqueeze(-1)
without = {
    "padding": velocity(words=text.prompt_embeds.masked_fill(is_padding, 0)),
    "words": velocity(words=text.prompt_embeds.masked_fill(~is_padding, 0)),
    "CLIP's vector": velocity(pooled=torch.zeros_like(text.pooled_prompt_embeds)),
}
effect = {
    name: (100 * (each - velocity()).norm() / velocity().norm()).item()
    for name, each in without.items()
}
show(
    plots.grouped_bars(
        {"set to zero": effect}, xlabel="change of the velocity (% of its length)", digits=1
    ),
    alt="Change of the velocity when the padding's vectors, the words' vectors or CLIP's vector are"
    " set to zero. None is zero.",
)
assert min(effect.values()) > 0

# %% [markdown]
# *What to see*: the bar of the padding is not zero. FLUX.1 was trained with unmasked padding, so it expects it. That is why
# another `max_sequence_length` gives another image, and why masking the padding would be an error.
#
# **"CLIP tells FLUX.1 the words."** CLIP gives one vector only. Count the numbers that each encoder hands over:

# %% tags=["nbval-check-output"]
for anatomy in (mini, FLUX_1_DEV):
    sizes = anatomy.shapes()
    one, many = sizes["pooled_prompt_embeds"], sizes["prompt_embeds"]
    print(
        f"{anatomy.name:10} CLIP {one[1]:5,} numbers, T5 {many[1]:3} x {many[2]:5,} ="
        f" {many[1] * many[2]:9,} numbers"
    )

# %% [markdown]
# Only T5 hands over a vector for each word, which the image tokens can look at one by one (lesson 06). CLIP's vector is a
# summary. It is mixed with the noise level and the guidance, and sets the tone of all blocks (lesson 05).
#
# **"CLIP's vector in FLUX.1 is the CLIP text embedding."** Half true. The known CLIP embedding, which is compared with
# images, is this vector times one more matrix, the *text projection*. FLUX.1 leaves that out:

# %% tags=["nbval-check-output"]
print([name for name, _ in clip_encoder.named_children()])
assert not any("projection" in name for name in clip_encoder.state_dict())

# %% [markdown]
# ## Your turn
#
# ### Exercise 1: quick_gelu (easy, 5 minutes)


# %% tags=["exercise"]
def quick_gelu(x):
    """CLIP's activation of a tensor of any shape."""
    raise NotImplementedError


# %%
from flux_lab.exercises import check

check("quick_gelu", quick_gelu)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The formula stands above its picture. `torch.sigmoid` is the gate.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The factor 1.702 is inside of the sigmoid, `x` itself is outside.
#
# </details>


# %% tags=["solution"]
def quick_gelu(x):
    """CLIP's activation of a tensor of any shape."""
    return x * torch.sigmoid(1.702 * x)


# %% [markdown]
# ### Exercise 2: the pooled vector (medium, 10 minutes)
#
# `last_hidden_state` is `[batch, length, dim]`, `input_ids` is `[batch, length]`. Return `[batch, dim]`: for each sequence
# the vector at its *first* id that is `eos_token_id`. The padding has this id too.


# %% tags=["exercise"]
def pooled_vector(last_hidden_state, input_ids, eos_token_id):
    """The vector of the first end token of each sequence."""
    raise NotImplementedError


# %%
check("pooled_vector", pooled_vector)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `input_ids == eos_token_id` is a tensor of truth values. Where is the first one that is true?
#
# </details>
# <details><summary>Hint 2</summary>
#
# `argmax` of zeros and ones gives the first 1. It does not work on truth values: use `.int()`.
#
# </details>
# <details><summary>Hint 3</summary>
#
# With `places` of shape `[batch]`, index with two tensors: `states[torch.arange(batch), places]`.
#
# </details>


# %% tags=["solution"]
def pooled_vector(last_hidden_state, input_ids, eos_token_id):
    """The vector of the first end token of each sequence."""
    places = (input_ids == eos_token_id).int().argmax(dim=-1)
    return last_hidden_state[torch.arange(len(places)), places]


# %% [markdown]
# ### Exercise 3: T5's attention (medium, 15 minutes)
#
# `queries`, `keys` and `values` are `[batch, heads, length, head_dim]`, `position_bias` is `[1, heads, length, length]`.
# Return what the attention gives, with the shape of `values`.


# %% tags=["exercise"]
def t5_attention(queries, keys, values, position_bias):
    """The attention product of T5."""
    raise NotImplementedError


# %%
check("t5_attention", t5_attention)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `keys.mT` swaps the last two axes. `queries @ keys.mT` holds a score for each query and key.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Add the bias, take the softmax over the keys, which is the last axis, then multiply by the values. No scaling.
#
# </details>


# %% tags=["solution"]
def t5_attention(queries, keys, values, position_bias):
    """The attention product of T5."""
    weights = (queries @ keys.mT + position_bias).softmax(dim=-1)
    return weights @ values


# %% [markdown]
# ### Exercise 4: several images of each prompt (easy, 5 minutes)
#
# `prompt_embeds` is `[batch, length, dim]`. Return `[batch * num_images_per_prompt, length, dim]` in the order in which
# the pipeline wants it.


# %% tags=["exercise"]
def repeat_for_images(prompt_embeds, num_images_per_prompt):
    """Each prompt's vectors, once for each of its images."""
    raise NotImplementedError


# %%
check("repeat_for_images", repeat_for_images)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Two images of the prompts a and b: the order is a, a, b, b.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.repeat_interleave` repeats along an axis in this order; `Tensor.repeat` does not.
#
# </details>


# %% tags=["solution"]
def repeat_for_images(prompt_embeds, num_images_per_prompt):
    """Each prompt's vectors, once for each of its images."""
    return torch.repeat_interleave(prompt_embeds, num_images_per_prompt, dim=0)


# %% [markdown]
# ## Recap
#
# 1. CLIP: causal mask, places as learned vectors, scores divided by √d, quick_gelu. FLUX.1 takes one vector, at the first
#    end token.
# 2. T5: every token sees every token, order only through a learned bias on the scores, no scaling, RMSNorm, a gated MLP.
#    FLUX.1 takes all vectors.
# 3. `prompt` goes to CLIP, `prompt_2` to T5. For several images the vectors are repeated, copies side by side.
# 4. Padding is not masked: T5 attends to it, and so does the transformer.
# 5. Our vectors are those of `transformers`, up to rounding.
#
# **Next**: the text is ready: `prompt_embeds` `[1, 32, 128]` (FLUX.1-dev: `[1, 512, 4096]`) and `pooled_prompt_embeds`
# `[1, 64]` (`[1, 768]`). They wait until lesson 05. Lesson 03 turns to the picture's side and picks up the noise, `[1, 16,
# 16, 16]` (`[1, 16, 128, 128]`).
