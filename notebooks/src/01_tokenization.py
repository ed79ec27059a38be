# %% [markdown]
# # 01 · Tokenization: from words to ids
#
# After this lesson you can
#
# - cut a word into CLIP's pieces by hand, merge by merge, and into T5's, by the best path through a lattice;
# - say what happens to long prompts, capital letters, other languages and emoji, before you type them;
# - read any row of ids: start, text, end, padding.
#
# **Time**: a quarter of a minute to run, 45 minutes to study. **You need**: Python. Lesson 00 helps, nothing of it is used.

# %%
import copy
from collections import Counter
from itertools import pairwise

import numpy as np
import torch

import flux_lab
from flux_lab import clip_tokenizer, instruments, t5_tokenizer
from flux_lab.instruments import FLUX_1_DEV, Table, explore, plots, show, source

torch.set_grad_enabled(False)
pipe = flux_lab.load_mini()
clip, t5 = pipe.tokenizer, pipe.tokenizer_2
mini = instruments.anatomy_of(pipe)  # its sizes

# %% [markdown]
# ## You are here

# %%
show(
    plots.pipeline_map("tokenization"),
    alt="Map of the pipeline with the two tokenizers lit: a prompt goes in, ids come out, [1, 77]"
    " for CLIP and"
    " [1, 32] for T5, in FLUX.1-dev [1, 512].",
)

# %% [markdown]
# *What to see*: the two lit boxes. Strings go in, and whole numbers come out. There are two tokenizers because there
# are two text encoders, and each was trained with its own.
#
# ## The idea
#
# A network computes with numbers, so a text must become numbers first. A **tokenizer** has a fixed list of pieces of
# text, its **vocabulary**. It cuts a text into pieces from that list. A piece in a text is a **token**; its place in
# the list is its **id**. With a vocabulary of $V$ pieces and room for $L$ tokens, a tokenizer is a function
#
# $$\text{text} \;\longmapsto\; (i_1, \dots, i_L), \qquad i_k \in \{0, \dots, V-1\}.$$
#
# Whole words as pieces would need an endless list. Single letters would make endless sequences. Both tokenizers of
# FLUX.1 stand in between: frequent words are one piece, rare words are put together from several. They differ in *how*
# they cut.

# %%
PROMPT = "a large shiny red sphere to the left of a small turquoise cylinder on a wooden floor"
show(
    plots.token_strips({"CLIP": clip.explain(PROMPT), "T5": t5.explain(PROMPT)}),
    alt="The prompt cut by CLIP and by T5. Each word is one piece, with its id below. CLIP adds a"
    " start and an end token, T5 an end token.",
)

# %% [markdown]
# *What to see*: one box is one token, the number below is its id. Every word of this prompt is frequent in the
# captions that the miniature was trained on, so it is one piece. CLIP writes the end of a word, `</w>`. T5 writes its
# beginning, `▁`. Gray boxes are **special tokens**, which stand for no text: start and end.
#
# Rare words show how it works:

# %%
rare = "greenish cubes, cylindrical"
show(
    plots.token_strips({"CLIP": clip.explain(rare), "T5": t5.explain(rare)}),
    alt="Three rare words. Both tokenizers cut them into several pieces, at different places.",
)

# %% [markdown]
# *What to see*: the same words, cut at different places. The real vocabularies are larger, so fewer words are rare
# (of T5's ids in FLUX.1-dev the last 28 stand for nothing; they fill its table of vectors):

# %% tags=["nbval-check-output"]
rows = []
for name, part, length in (("CLIP", "text_encoder", 77), ("T5", "text_encoder_2", None)):
    sizes = [getattr(anatomy, part).vocab_size for anatomy in (mini, FLUX_1_DEV)]
    slots = [length or anatomy.length for anatomy in (mini, FLUX_1_DEV)]
    rows += [[f"{name}: ids in the vocabulary", *sizes], [f"{name}: slots for tokens", *slots]]
assert [len(clip.vocab), len(t5.vocab)] == [
    mini.text_encoder.vocab_size,
    mini.text_encoder_2.vocab_size,
]
print(Table(["", "miniature", "FLUX.1-dev"], rows))

# %% [markdown]
# ## CLIP: merge what stands together
#
# CLIP uses **byte-pair encoding**, BPE (Sennrich et al. 2016). It starts with the smallest symbols and merges
# neighbours. `explain` shows its steps. The first two clean the text and cut it into words:

# %% tags=["nbval-check-output"]
steps = clip.explain("  It's\n2 RED cubes!!")
print("cleaned:", repr(steps.cleaned))
print("words:  ", [word.text for word in steps.words])

# %% [markdown]
# White space is collapsed, capitals become small. A word is a run of letters, one digit, or a run of anything else.
# English endings such as `'s` are words of their own.
#
# ### Letters become bytes
#
# There are more than 150,000 characters. Computers store them in UTF-8, which needs one to four **bytes** each, and
# there are only 256 bytes. BPE starts from these. Every byte has a symbol that can be printed; the last one of a word
# has `</w>` at its end.

# %% tags=["nbval-check-output"]
for word in ("red", "é", "球", "🟥"):
    print(f"{word:3} {word.encode().hex(' '):12} {clip_tokenizer.spell(word)}")
symbols = clip_tokenizer.bytes_to_unicode().values()
assert all(symbol in clip.vocab and symbol + "</w>" in clip.vocab for symbol in symbols)

# %% [markdown]
# Each of the 256 symbols is in the vocabulary, with and without `</w>`. So CLIP can spell *any* text. It has no
# unknown token.
#
# ### One merge after the other
#
# The tokenizer has a list of **merges**: pairs of symbols. The line number of a pair is its **rank**. Of all
# neighbours in the word, the pair of the lowest rank is merged. Then it looks again, until no pair is in the list.

# %%
show(
    plots.bpe_ladder(clip.explain("turquoise").words[0]),
    alt="The word turquoise: nine bytes at the top, after eight merges one piece at the bottom. The"
    " new symbol of each row is lit.",
)

# %% [markdown]
# *What to see*: from top to bottom, one merge a row, the new symbol lit. The line numbers grow from row to row here:
# low ranks first. `u` and `r` go first because they stand together in many words. The last four, lines 155
# to 158, join the long pieces of this one word.
#
# A word that is not in the captions gets stuck on the way:

# %%
show(
    plots.bpe_ladder(clip.explain("greenish").words[0]),
    alt="The word greenish: after four merges four pieces are left: gre, en, i and sh.",
)

# %% [markdown]
# *What to see*: in the last row no two neighbours are in the list, so the word stays in pieces. Note what BPE missed:
# `green</w>` is in the vocabulary, but with the end of a word. Inside of `greenish` it cannot be used.
#
# ### Where the list comes from
#
# It is learned from many texts, with the same rule each time: count all neighbours, and write down the pair that is
# most frequent. Here are four words and how often each occurs:

# %% tags=["nbval-check-output"]
frequencies = {"cube": 6, "tube": 3, "cone": 5, "can": 2}
ranks = {}
for rank in range(6):
    counts = Counter()
    for word, times in frequencies.items():
        pieces, _ = clip_tokenizer.merge_symbols(clip_tokenizer.spell(word), ranks)
        for pair in pairwise(pieces):
            counts[pair] += times
    pair, times = max(counts.items(), key=lambda item: item[1])
    ranks[pair] = rank
    print(f"line {rank + 1}: {pair[0]} + {pair[1]}, {times} times")

# %% [markdown]
# `u + b` is in `cube` and in `tube`, 9 times together. After three lines `cube` is one piece. The miniature's list
# was learned in this way from its captions. How long is it?

# %% tags=["nbval-check-output"]
bytes_twice, specials = 2 * 256, 2
for anatomy in (mini, FLUX_1_DEV):
    size = anatomy.text_encoder.vocab_size
    print(
        f"{anatomy.name:10} {size:6,} pieces = {bytes_twice} bytes +"
        f" {size - bytes_twice - specials:6,} merges + {specials} special tokens"
    )
assert len(clip.ranks) == mini.text_encoder.vocab_size - bytes_twice - specials

# %% [markdown]
# Each merge makes one new piece, so a vocabulary is exactly: bytes, merges, special tokens.
#
# ## T5: the most likely cut
#
# T5 uses a **unigram language model** (Kudo 2018). Each piece has a probability, learned from texts. Of all the ways
# to put a word together, take the one with the highest probability. Pieces count as independent, so probabilities are
# multiplied. We add logarithms instead, which is the same and keeps the numbers at a good size:
#
# $$\text{best cut} = \arg\max_{p_1 p_2 \dots p_k \,=\, \text{word}} \;\sum_{j=1}^{k} \log P(p_j).$$
#
# $P(p)$ is a number between 0 and 1 with no unit, so its logarithm is negative. Nearer to 0 is more likely.
#
# First the text is **normalised**: look-alikes become one character. Then it is split at white space, and every word
# gets a `▁` in front.

# %% tags=["nbval-check-output"]
steps = t5.explain("A ﬁne  ① cube™")
print("normalised:", repr(steps.normalized))
print("words:     ", [word.text for word in steps.words])

# %% [markdown]
# The ligature `ﬁ` became two letters, `①` a `1`. The capital stayed: T5 does not lower-case.
#
# ### The lattice and its best path
#
# All pieces that fit somewhere in a word form a **lattice**. A **path** goes from its left end to its right end, and
# each piece starts where the one before it ends.

# %%
greenish = t5.explain("greenish").words[0]
show(
    plots.unigram_lattice(greenish),
    alt="All pieces that fit into ▁greenish, each over the characters it covers. The best path is"
    " filled: ▁green, is, h.",
)

# %% [markdown]
# *What to see*: the columns are the characters of the word, a box is a piece with its log-probability. The filled
# boxes are the best path. Compare two numbers: `▁green` is more likely than any single letter below it. That is why long
# pieces win, if they are in the vocabulary.
#
# How many paths are there? Too many to try for a long word. The **Viterbi algorithm** needs one pass. It keeps, for
# each place in the word, only the best way to get there:

# %% tags=["nbval-check-output"]
paths, best = {0: 1}, {0: (0.0, "")}
for piece in greenish.lattice:  # in the order of their start
    paths[piece.end] = paths.get(piece.end, 0) + paths[piece.start]
    total = best[piece.start][0] + piece.score
    if piece.end not in best or total > best[piece.end][0]:
        best[piece.end] = (total, piece.piece)
rows = [
    [greenish.text[:end], paths[end], f"{best[end][0]:.2f}", best[end][1]]
    for end in sorted(best)[1:]
]
print(Table(["up to here", "paths", "best sum", "last piece"], rows))
assert abs(best[len(greenish.text)][0] - greenish.score) < 1e-9

# %% [markdown]
# Read the answer from the bottom up: the last piece is `h`; one character before the end, the last piece is `is`; two
# before that, it is `▁green`.
#
# Is it not enough to take the longest piece from the left? Not always:

# %% tags=["nbval-check-output"]
word = t5.explain("cylindrical").words[0]
rest, longest = word.text, []
while rest:
    longest.append(max((piece for piece in t5.scores if rest.startswith(piece)), key=len))
    rest = rest.removeprefix(longest[-1])
print("best path:    ", *[f"{piece.piece}" for piece in word.path], f"sum {word.score:.2f}")
print("longest first:", *longest, f"sum {sum(t5.scores[piece][1] for piece in longest):.2f}")

# %%
show(
    plots.unigram_lattice(word),
    alt="The lattice of ▁cylindrical with its best path, which takes d, r, ic where the longest"
    " pieces would be d, ri, c.",
)

# %% [markdown]
# *What to see*: `ri` and `ic` both want the `i`. The best path takes `ic` and leaves `r` alone, because the sum is
# higher. A rule that never looks ahead cannot see this.
#
# ## One length for all
#
# A batch is a tensor, so all its rows have one length. A short text is filled up behind its end token: **padding**. A
# long one is cut, and keeps its end token: **truncation**.

# %% tags=["nbval-check-output"]
clip_ids, t5_ids = clip(PROMPT), t5(PROMPT)
for name, ids, tokenizer in (("CLIP", clip_ids, clip), ("T5", t5_ids, t5)):
    print(
        f"{name:4} shape {list(ids.shape)}, {ids.dtype}, end {tokenizer.eos_token_id}, padding"
        f" {tokenizer.pad_token_id}"
    )
    print("    ", ids[0].tolist())


# %%
def kinds(tokenizer, text, length, start):
    count = min(len(tokenizer.encode(text)), length)
    return (
        ["start"] * start
        + ["text"] * (count - start - 1)
        + ["end"]
        + ["padding"] * (length - count)
    )


slots = {"CLIP, 77 slots in both models": kinds(clip, PROMPT, 77, start=1)}
for anatomy in (mini, FLUX_1_DEV):
    slots[f"T5, {anatomy.length} slots in {anatomy.name}"] = kinds(
        t5, PROMPT, anatomy.length, start=0
    )
show(
    plots.slot_grid(slots),
    alt="What stands in each slot for the prompt: some text, then padding. Of T5's 512 slots almost"
    " all are padding.",
)

# %% [markdown]
# *What to see*: blue is text. With this prompt, nearly all of FLUX.1-dev's 512 slots are padding. CLIP's padding is
# its end token again, id 999 here; T5's has an id of its own, 0. Keep this picture in mind. Lesson 02 asks whether the
# network ignores those slots. (FLUX.1-schnell, the faster sister model, has 256 slots for T5.)
#
# A prompt that is too long:

# %% tags=["nbval-check-output"]
print(*t5.pieces_of(t5(PROMPT, max_length=8)[0]))
long = " and ".join([PROMPT] * 6)
print(
    f"six prompts in one: CLIP {len(clip.encode(long))} tokens, reads 77; T5 {len(t5.encode(long))}"
    " tokens, reads up to 512 in FLUX.1-dev"
)
print("CLIP's last three:", *clip.pieces_of(clip(long)[0, -3:]))

# %% [markdown]
# The words behind the cut are lost without a trace in the ids. `pipe(...)` warns, and names them.
#
# ## Other languages, unknown characters
#
# One idea, five languages. How many tokens does each need? (The special tokens are not counted.)

# %%
languages = {
    "English": "a red cube on the grass",
    "French": "un cube rouge sur l'herbe",
    "Russian": "красный куб на траве",
    "Chinese": "草地上的红色立方体",
    "emoji": "🟥🧊🌱",
}
ids = {name: (clip.encode(text)[1:-1], t5.encode(text)[:-1]) for name, text in languages.items()}

# %%
counted = {
    "characters": {name: len(text) for name, text in languages.items()},
    "CLIP tokens": {name: len(clip_ids) for name, (clip_ids, _) in ids.items()},
    "T5 tokens": {name: len(t5_ids) for name, (_, t5_ids) in ids.items()},
    "T5 tokens that are unknown": {
        name: t5_ids.count(t5.unk_token_id) for name, (_, t5_ids) in ids.items()
    },
}
show(
    plots.grouped_bars(counted, xlabel="number"),
    alt="Characters and tokens of one sentence in five languages. English needs 6 tokens; in"
    " Russian, Chinese and emoji"
    " CLIP needs more tokens than there are characters, and T5 gives unknown tokens.",
)

# %%
show(
    plots.token_strips(
        {f"{name}, T5": t5.explain(languages[name]) for name in ("French", "Russian", "Chinese")}
    ),
    alt="T5's tokens of the French, the Russian and the Chinese sentence. All Russian words and the"
    " whole Chinese sentence are unknown.",
)

# %% [markdown]
# *What to see*: orange is `<unk>`, id 2, the **unknown** token. (`▯` stands for a character that the picture's font
# lacks.) Neighbouring unknown characters become *one* token: of the Chinese sentence T5 learns only that there is
# something. CLIP spells it byte by byte: nothing is lost, but one character costs three tokens, and no byte means much
# alone.
#
# The miniature knows the characters of English only. FLUX.1-dev's T5 vocabulary was learned from English, German,
# French and Romanian (Raffel et al. 2020): these are spelled well, Chinese characters are unknown there too.
#
# ## The real code
#
# `merge_symbols` is the ladder. It keeps the pairs in a heap, so that a text of 10,000 characters does not take
# forever. Without that, it would be five lines: you will write them below.

# %%
source(clip_tokenizer.merge_symbols)

# %% [markdown]
# `best_path` is Viterbi's pass, and the walk back. `None` marks a place that no path has reached yet.

# %%
source(t5_tokenizer.best_path)

# %% [markdown]
# And what both tokenizers share: length, truncation, padding.

# %%
source(clip.__call__)

# %% [markdown]
# ## Shapes
#
# Ids are 64-bit whole numbers, one row for each text.

# %% tags=["nbval-check-output"]
texts = [PROMPT, "a cone", ""]
for anatomy in (mini, FLUX_1_DEV):
    clip_batch, t5_batch = clip(texts), t5(texts, max_length=anatomy.length)
    assert clip_batch.shape == (3, *anatomy.shapes()["clip_ids"][1:]) == (3, 77)
    assert t5_batch.shape == (3, *anatomy.shapes()["t5_ids"][1:])
    assert clip_batch.dtype == t5_batch.dtype == torch.int64
    print(f"{anatomy.name:10} CLIP {list(clip_batch.shape)}, T5 {list(t5_batch.shape)}")
print("the empty prompt:", clip.encode(""), t5.encode(""))

# %% [markdown]
# The empty prompt is not nothing: start and end for CLIP, end for T5. Now a wrong shape. The ids of one text, without
# the axis `batch`, go into FLUX.1-dev's T5 encoder (on the `meta` device, without weights). Read the error:

# %% tags=["nbval-check-output"]
from flux_lab.shapes import ShapeError

try:
    instruments.on_meta("text_encoder_2", FLUX_1_DEV)(t5_batch[0].to("meta"))
except ShapeError as error:
    print(error)

# %% [markdown]
# ## Trust, then verify
#
# The reference is `transformers`. It reads the same two folders. The texts: 400 captions, hard cases, and 200 strings
# of random characters from many scripts. Ids are whole numbers, so there is no rounding: all must be equal.

# %%
import unicodedata

from flux_lab.training.captions import captions
from flux_lab.training.world import sample_scene

rng = np.random.default_rng(0)
texts = [caption.text for _ in range(200) for caption in captions(sample_scene(rng), rng, 2)]
texts += [
    *languages.values(),
    long,
    "",
    "  \n\t",
    "<|endoftext|> a </s> <pad> <extra_id_3>",
    "ΟΔΟΣ ΣΟΦΟΣ",
    "e\u0301 n\u0303",
    "x" * 500,
]
assigned = [
    code for code in range(32, 0x3100) if unicodedata.category(chr(code)) not in ("Cn", "Cs")
]
texts += ["".join(map(chr, rng.choice(assigned, 12))) for _ in range(200)]

# %% tags=["nbval-check-output"]
import transformers

folder = flux_lab.data_dir() / "flux-mini"
theirs = {
    "CLIP": transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
    "T5": transformers.T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
}
for name, ours, length in (("CLIP", clip, 77), ("T5", t5, 32), ("T5", t5, 512)):
    reference = theirs[name](
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids
    difference = int((ours(texts, max_length=length) - reference).abs().max())
    print(
        f"{name:4} {len(texts)} texts, {length:3} ids each, largest difference of an id:"
        f" {difference}"
    )
    assert difference == 0

# %% [markdown]
# ## Turn the knob
#
# Type anything. Try your name, a word in capitals, two words written as one, an emoji.


# %%
def cut(text="a spherecube, SHINY"):
    return plots.token_strips({"CLIP": clip.explain(text), "T5": t5.explain(text)})


explore(
    cut,
    text=str,
    alt="The text 'a spherecube, SHINY', cut by both tokenizers into pieces of words.",
)


# %% [markdown]
# And one word, the last that you type, under the microscope. Which words of your own are one piece? Is `shiny` cheaper
# than `shine`?


# %%
def microscope(word="astronaut", tokenizer="T5"):
    last = (word.split() or ["a"])[-1]
    if tokenizer == "CLIP":
        return plots.bpe_ladder(clip.explain(last).words[0])
    return plots.unigram_lattice(t5.explain(last).words[0])


explore(
    microscope,
    word=str,
    tokenizer=["CLIP", "T5"],
    alt="The lattice of ▁astronaut: ▁a and eight single letters are the best path.",
)

# %% [markdown]
# ## Break it
#
# The list of merges has an order. **Predict first**: we turn the list upside down, so that the last line comes first.
# The vocabulary stays. Will frequent words still be one piece? And with only the first 100 lines, or with none?

# %%
last = len(clip.ranks) - 1
lists = {
    "in order": clip.ranks,
    "upside down": {pair: last - rank for pair, rank in clip.ranks.items()},
    "100 lines": {pair: rank for pair, rank in clip.ranks.items() if rank < 100},
    "no merges": {},
}

# %%
cuts = {}
for name, ranks in lists.items():
    broken = copy.copy(clip)
    broken.ranks = ranks
    cuts[name] = broken.explain("a shiny turquoise cylinder")
    average = np.mean([len(broken.encode(text)) for text in texts[:400]])
    print(f"{name:12} {len(cuts[name].ids):2} tokens; the captions have {average:.1f} on average")
show(
    plots.token_strips(cuts),
    alt="The same text with four lists of merges: in order, upside down, 100 lines, none.",
)

# %% [markdown]
# *What to see*: upside down, the late pairs `n + y</w>` and `s + h` are merged first. Then `hiny</w>` cannot form, no
# `s` is left for it, and `shiny` can never come together. Fewer lines mean shorter pieces and longer sequences. Yet all
# four are correct spellings of the same text. The encoder was trained with the first only; to it, the others read like
# a text in code.
#
# And T5 without its probabilities: every piece gets the same.

# %% tags=["nbval-check-output"]
flat = copy.copy(t5)
flat.scores = {piece: (index, -1.0) for piece, (index, _) in t5.scores.items()}
for text in ("ones", "wine", "greenish", "a red sphere"):
    right, broken = (
        [piece.piece for word in each.explain(text).words for piece in word.path]
        for each in (t5, flat)
    )
    print(f"{text:12} {' '.join(right):28} flat: {' '.join(broken)}")

# %% [markdown]
# With equal scores the fewest pieces win. Between cuts of equal length, as in `ones` and `wine`, not the language
# decides but a rule for ties: the longer last piece. The probabilities matter where several cuts compete. A word that
# is one piece stays one: nothing is shorter.
#
# ## Common misreadings
#
# **"A token is a word."** Only if the word is frequent:

# %% tags=["nbval-check-output"]
for word in ("cube", "cubes", "sphere", "spheres", "astronaut"):
    print(
        f"{word:10} CLIP {len(clip.explain(word).words[0].ids)}, T5"
        f" {len(t5.explain(word).words[0].fused())}"
    )

# %% [markdown]
# **"CLIP reads the first 77 words."** It has 77 slots. Two of them are start and end, so 75 are left for pieces:

# %% tags=["nbval-check-output"]
ids = clip("cube " * 100)[0]
print("slots:", len(ids), " cubes that fit:", int((ids == clip.vocab["cube</w>"]).sum()))

# %% [markdown]
# **"FLUX.1 cannot read a prompt of more than 77 tokens."** CLIP cannot. T5 reads the same prompt a second time, with
# up to 512 slots in FLUX.1-dev. You saw both counts above.
#
# **"Capital letters make no difference."** True for CLIP, which lower-cases. Not for T5:

# %%
show(
    plots.token_strips(
        {
            f"{name}: {text}": each.explain(text)
            for text in ("red cube", "RED Cube")
            for name, each in (("CLIP", clip), ("T5", t5))
        }
    ),
    alt="CLIP gives the same ids for red cube and RED Cube. T5 gives two tokens for the first, and"
    " nine for the second.",
)
assert clip.encode("RED Cube") == clip.encode("red cube")
assert t5.encode("RED Cube") != t5.encode("red cube")

# %% [markdown]
# *What to see*: CLIP's two rows have the same ids. T5 spells `RED Cube` letter by letter: the miniature has seen few
# capitals. FLUX.1-dev's T5 knows many words with a capital, but `RED` is another piece there, too.
#
# **"Padding is id 0."** For T5. CLIP pads with its end token:

# %% tags=["nbval-check-output"]
print("CLIP:", *clip.pieces_of(clip("a cone", max_length=7)[0]))
print("T5:  ", *t5.pieces_of(t5("a cone", max_length=7)[0]))

# %% [markdown]
# **"What I type is read as text."** Not always. If you write one into your prompt, it *is* the special token:

# %% tags=["nbval-check-output"]
print(clip.encode("a cone <|endoftext|> a cube"), "end token:", clip.eos_token_id)
print(t5.encode("a cone </s> a cube"), "end token:", t5.eos_token_id)

# %% [markdown]
# For CLIP, the first end token is where it reads off its vector (lesson 02). What stands behind it does not count.
#
# ## Your turn
#
# ### Exercise 1: one merge (easy, 10 minutes)
#
# Given a list of symbols, join every `left` that is directly followed by `right`. Walk from the left. Do not change
# the list itself.


# %% tags=["exercise"]
def merge_pair(symbols, left, right):
    """A new list of symbols in which each left, right is one symbol."""
    raise NotImplementedError


# %%
from flux_lab.exercises import check

check("merge_pair", merge_pair)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Use a `while` loop with an index. Sometimes it goes on by 1, sometimes by 2.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `symbols[i : i + 2] == [left, right]` is also safe for the last symbol.
#
# </details>


# %% tags=["solution"]
def merge_pair(symbols, left, right):
    """A new list of symbols in which each left, right is one symbol."""
    merged, i = [], 0
    while i < len(symbols):
        found = symbols[i : i + 2] == [left, right]
        merged.append(left + right if found else symbols[i])
        i += 2 if found else 1
    return merged


# %% [markdown]
# ### Exercise 2: byte-pair encoding (medium, 15 minutes)
#
# `ranks` maps a pair, a tuple of two symbols, to its rank. Merge until no neighbours are in `ranks`. You may use your
# `merge_pair`, or write it all anew.


# %% tags=["exercise"]
def bpe(symbols, ranks):
    """The list of pieces that are left when nothing can be merged."""
    raise NotImplementedError


# %%
check("bpe", bpe)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `itertools.pairwise(symbols)` gives all neighbours as tuples. Keep those that are in `ranks`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `min(pairs, key=ranks.get)` is the pair to merge next. Then start over with the new list.
#
# </details>


# %% tags=["solution"]
def bpe(symbols, ranks):
    """The list of pieces that are left when nothing can be merged."""
    symbols = list(symbols)
    while pairs := [pair for pair in pairwise(symbols) if pair in ranks]:
        left, right = min(pairs, key=ranks.get)
        merged = []
        for symbol in symbols:
            if merged and (merged[-1], symbol) == (left, right):
                merged[-1] = left + right
            else:
                merged.append(symbol)
        symbols = merged
    return symbols


# %% [markdown]
# ### Exercise 3: the best path (medium, 20 minutes)
#
# `scores` maps a piece to its log-probability. Return the pieces of the cut with the highest sum. Every single
# character of `word` is a piece, so there is always a cut.


# %% tags=["exercise"]
def best_path(word, scores):
    """The list of pieces of the best cut."""
    raise NotImplementedError


# %%
check("best_path", best_path)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Keep, for every number of characters, the best sum and the pieces that give it. For 0 characters these are `0.0` and
# `[]`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# For every `end`, try all `start < end` where `word[start:end]` is a piece. The sum is the best one up to `start`, plus
# the score of the piece.
#
# </details>


# %% tags=["solution"]
def best_path(word, scores):
    """The list of pieces of the best cut."""
    best = [(0.0, [])]
    for end in range(1, len(word) + 1):
        ways = [
            (best[start][0] + scores[word[start:end]], [*best[start][1], word[start:end]])
            for start in range(end)
            if word[start:end] in scores
        ]
        best.append(max(ways))
    return best[-1][1]


# %% [markdown]
# ### Exercise 4: one length for all (easy, 10 minutes)
#
# `ids` is a list with the end token at its end. Return an int64 tensor of `length` ids, cut or padded.


# %% tags=["exercise"]
def fit_length(ids, length, pad_id):
    """A tensor of `length` ids."""
    raise NotImplementedError


# %%
check("fit_length", fit_length)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Two cases: too long, or not. What must the last id be if the text was cut?
#
# </details>
# <details><summary>Hint 2</summary>
#
# Too long: the first `length - 1` ids, then `ids[-1]`. Too short: `pad_id` as often as needed, behind the ids.
#
# </details>


# %% tags=["solution"]
def fit_length(ids, length, pad_id):
    """A tensor of `length` ids."""
    if len(ids) > length:
        ids = [*ids[: length - 1], ids[-1]]
    return torch.tensor(ids + [pad_id] * (length - len(ids)))


# %% [markdown]
# ## Recap
#
# 1. A tokenizer cuts text into pieces of a fixed vocabulary. Frequent words are one piece, rare ones are several.
# 2. CLIP: clean, lower-case, spell in bytes, then merge the pair of lowest rank again and again. Any text can be
#    spelled.
# 3. T5: normalise, put `▁` in front of words, then take the path through the lattice with the highest sum of
#    log-probabilities. What it cannot spell is `<unk>`.
# 4. 77 slots for CLIP, 512 for T5 in FLUX.1-dev (32 here). Too long: cut before the end token. Too short: padded
#    behind it.
# 5. Our ids are those of `transformers`, text by text, id by id.
#
# **Next**: lesson 02 picks up the two tensors of ids, `[1, 77]` and `[1, 32]` (FLUX.1-dev: `[1, 512]`), and turns each
# into vectors.
