"""Pictures of how a text becomes ids: merges one by one, the lattice and its best path, pieces in a row, slots and padding."""

import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Patch, Rectangle

from flux_lab import clip_tokenizer, t5_tokenizer
from flux_lab.instruments.plots.pictures import chart
from flux_lab.instruments.style import BLUE, CYCLE, DPI, FAINT, INK, LIT, ORANGE, PALE, PAPER, WIDTH

MONO = {"family": "monospace", "parse_math": False}  # a `$` in a text is no formula
CHARACTER = 0.0084  # inches of one monospaced character for each point of its size
NAMES = 1.3  # inches for the names of the rows
MISSING = "▯"
SPECIAL = {*clip_tokenizer.DEFAULT_NAMES.values(), *t5_tokenizer.DEFAULT_NAMES.values()} - {"<unk>"}
# Kind of slot -> colour and the letter that stands in it.
SLOTS = {"start": (ORANGE, "s"), "text": (BLUE, "t"), "end": (LIT, "e"), "padding": (PALE, "·")}
HATCHES = ("", "//", "..", "xx", "\\\\")

Explanation = clip_tokenizer.Explanation | t5_tokenizer.Explanation


def bpe_ladder(word: clip_tokenizer.Word) -> Figure:
    """The symbols of a word before the first merge and after every one, from top to bottom. The new symbol of each row is lit."""
    stages, size = list(word.stages()), len(word.symbols)
    figure = Figure(figsize=(WIDTH, 0.9 + 0.42 * len(stages)), dpi=DPI, facecolor=PAPER, layout="constrained")
    axes = figure.add_subplot(xlabel="place in the word (bytes)", ylabel="merges done", xlim=(0, size * 1.55), ylim=(len(stages), 0))
    for row, symbols in enumerate(stages):
        merge = word.merges[row - 1] if row else None
        start = 0
        for symbol in symbols:
            width = len(symbol.removesuffix(clip_tokenizer.END_OF_WORD)) or 1
            _box(axes, start, row, width, symbol, LIT if merge and merge.start == start else PALE)
            start += width
        note = f"{merge.left} + {merge.right}, line {merge.rank + 1} of the list" if merge else "one symbol for each byte"
        axes.text(size * 1.03, row + 0.5, drawable(note), va="center", fontsize=9.5, color=INK, **MONO)
    axes.set_xticks(range(size + 1))
    axes.set_yticks([row + 0.5 for row in range(len(stages))], range(len(stages)))
    axes.spines[:].set_visible(False)
    return figure


def unigram_lattice(word: t5_tokenizer.Word) -> Figure:
    """All pieces that fit into a word, each with its log-probability over the characters that it covers; the best path is filled.

    Raises ValueError for a special token, which has no lattice.
    """
    if not word.lattice:
        raise ValueError(f"word: expected a word with a lattice, got the special token {word.text!r}")
    rows = _packed(word.lattice)
    size, path = len(word.text), set(word.path)
    title = f"best path: {' + '.join(each.piece for each in word.path)}, sum of log-probabilities {word.score:.2f}"
    figure = Figure(figsize=(WIDTH, 1.3 + 0.55 * len(rows)), dpi=DPI, facecolor=PAPER, layout="constrained")
    axes = figure.add_subplot(xlim=(0, size), ylim=(0, len(rows)), xlabel="character of the word", ylabel="pieces that fit")
    axes.set_title(drawable(title), fontsize=10, color=INK, **MONO)
    for height, row in enumerate(rows):
        for each in row:
            text = f"{each.piece}\n{each.score:.2f}"
            fill = ORANGE if each.id == t5_tokenizer.UNKNOWN_ID else BLUE
            _box(axes, each.start, height, each.end - each.start, text, fill if each in path else PALE, white=each in path)
    axes.set_xticks([place + 0.5 for place in range(size)], [drawable(character) for character in word.text], **MONO)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _packed(candidates: Sequence[t5_tokenizer.Candidate]) -> list[list[t5_tokenizer.Candidate]]:
    """Candidates in rows in which none lies over another; the short ones come first."""
    rows: list[list[t5_tokenizer.Candidate]] = []
    for candidate in sorted(candidates, key=lambda each: (each.end - each.start, each.start)):
        for row in rows:
            if all(candidate.end <= other.start or other.end <= candidate.start for other in row):
                row.append(candidate)
                break
        else:
            rows.append([candidate])
    return rows


def token_strips(rows: Mapping[str, Explanation]) -> Figure:
    """The pieces of texts in a row each, the id under every piece. Gray: special; orange: unknown; long rows are wrapped."""
    lines = [(name if first else "", line) for name, each in rows.items() for first, line in _wrapped(each)]
    height = 0.62 * len(lines) + 0.1
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    axes.set_axis_off()
    for place, (name, line) in enumerate(lines):
        top = 0.08 + 0.62 * place
        axes.text(NAMES - 0.12, top + 0.16, name, ha="right", va="center", fontsize=9.5, color=INK)
        for start, width, piece, index, fill in line:
            _box(axes, start + 0.02, top, width - 0.04, piece, fill, height=0.32)
            axes.text(start + width / 2, top + 0.44, str(index), ha="center", va="center", fontsize=8, color=INK)
    return figure


def _wrapped(explanation: Explanation) -> Iterator[tuple[bool, list[tuple[float, float, str, int, str]]]]:
    """Lines of (start, width, piece, id, colour), and whether a line is the first. Lengths are inches."""
    has_unknown = isinstance(explanation, t5_tokenizer.Explanation)
    line, start, first = [], NAMES, True
    for piece, index in zip(explanation.pieces, explanation.ids, strict=True):
        text = piece if len(piece) <= 40 else piece[:39] + "…"
        width = max(CHARACTER * 9.5 * len(text), CHARACTER * 8 * len(str(index))) + 0.16
        if start + width > WIDTH and line:
            yield first, line
            line, start, first = [], NAMES, False
        unknown = has_unknown and index == t5_tokenizer.UNKNOWN_ID
        line.append((start, width, text, index, ORANGE if unknown else FAINT if piece in SPECIAL else PALE))
        start += width
    yield first, line


def slot_grid(rows: Mapping[str, Sequence[str]], across: int = 32) -> Figure:
    """What stands in each slot of a sequence, one block of cells for each name. A kind of slot is one of SLOTS.

    Raises ValueError for another kind.
    """
    for name, kinds in rows.items():
        if unknown := set(kinds) - set(SLOTS):
            raise ValueError(f"rows: {name!r} holds {sorted(unknown)}, expected {list(SLOTS)}")
    deep = [-(-len(kinds) // across) for kinds in rows.values()]
    figure = Figure(figsize=(WIDTH, 0.9 + 0.2 * sum(deep) + 0.5 * len(rows)), dpi=DPI, facecolor=PAPER, layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False, gridspec_kw={"height_ratios": [depth + 1 for depth in deep]})[:, 0]
    for axes, depth, (name, kinds) in zip(panels, deep, rows.items(), strict=True):
        axes.set(xlim=(0, across), ylim=(depth, 0))
        axes.set_title(name, fontsize=10, color=INK, loc="left")
        for slot, kind in enumerate(kinds):
            fill, letter = SLOTS[kind]
            _box(axes, slot % across, slot // across, 1, letter, fill, white=kind == "text", size=7.5)
        axes.set_yticks([row + 0.5 for row in range(0, depth, 4)], [row * across for row in range(0, depth, 4)], fontsize=8)
        axes.set_ylabel("first slot\nof the row", fontsize=8)
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
    handles = [Patch(facecolor=fill, edgecolor=INK, linewidth=0.6, label=f"{letter}  {kind}") for kind, (fill, letter) in SLOTS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(SLOTS), frameon=False, fontsize=9)
    return figure


def grouped_bars(values: Mapping[str, Mapping[str, float]], xlabel: str, digits: int = 0) -> Figure:
    """One horizontal bar for each label, beside it those of the other named series. Every bar has its number at its end."""
    labels = list(next(iter(values.values())))
    figure, axes = chart(0.9 + 0.24 * len(labels) * len(values), xlabel=xlabel)
    thick = 0.82 / len(values)
    for place, (name, series) in enumerate(values.items()):
        places = np.arange(len(labels)) + (place - (len(values) - 1) / 2) * thick
        style = {"color": CYCLE[place % len(CYCLE)], "hatch": HATCHES[place % len(HATCHES)], "edgecolor": PAPER, "linewidth": 0}
        bars = axes.barh(places, [series[label] for label in labels], thick, label=name, **style)
        axes.bar_label(bars, [f"{series[label]:.{digits}f}" for label in labels], padding=3, fontsize=8.5, color=INK)
    axes.set_yticks(range(len(labels)), [drawable(label) for label in labels], parse_math=False)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(values), fontsize=9, columnspacing=1.2)
    return figure


# ---- cells and letters --------------------------------------------------------------------------------------------------


def _box(
    axes: Axes, x: float, y: float, width: float, text: str, fill: str, height: float = 0.9, white: bool = False, size: float = 9.5
) -> None:
    """A filled cell with a text in its middle."""
    axes.add_patch(Rectangle((x, y), width, height, facecolor=fill, edgecolor=INK, linewidth=0.6))
    color = PAPER if white else INK
    axes.text(x + width / 2, y + height / 2, drawable(text), ha="center", va="center", fontsize=size, color=color, **MONO)


@functools.cache
def _known_characters() -> frozenset[int]:
    return frozenset(FT2Font(findfont("DejaVu Sans Mono")).get_charmap())


def drawable(text: str) -> str:
    """The text with `▯` in place of every character that the pictures' font does not have."""
    return "".join(character if character == "\n" or ord(character) in _known_characters() else MISSING for character in text)
