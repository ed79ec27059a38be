"""The pictures of tokenization: what is drawn where, and what is refused."""

import warnings
from collections.abc import Iterator

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from flux_lab import data_dir
from flux_lab.clip_tokenizer import CLIPTokenizer
from flux_lab.instruments import plots
from flux_lab.instruments.plots.text import MISSING, SLOTS
from flux_lab.instruments.style import BLUE, FAINT, LIT, ORANGE, PALE, WIDTH
from flux_lab.t5_tokenizer import T5Tokenizer

FOLDER = data_dir() / "flux-mini"
CLIP = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
T5 = T5Tokenizer.from_pretrained(FOLDER / "tokenizer_2")


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """A missing glyph is only a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def cells(figure: Figure) -> list[tuple[str, str, float, float]]:
    """(text, colour, left, width) of every cell, in the order of drawing."""
    found = []
    for axes in figure.axes:
        boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        for box in boxes:
            middle = (box.get_x() + box.get_width() / 2, box.get_y() + box.get_height() / 2)
            (text,) = [each.get_text() for each in axes.texts if each.get_position() == pytest.approx(middle)]
            found.append((text, to_hex(box.get_facecolor()).lower(), box.get_x(), box.get_width()))
    return found


def test_ladder_has_a_row_for_every_merge_and_lights_the_new_symbol() -> None:
    (word,) = CLIP.explain("metal").words
    figure = plots.bpe_ladder(word)
    assert [text for text, *_ in cells(figure)] == [symbol for stage in word.stages() for symbol in stage]
    lit = [(text, start) for text, color, start, _ in cells(figure) if color == LIT]
    assert lit == [(merge.left + merge.right, merge.start) for merge in word.merges]
    notes = {text.get_text() for text in figure.axes[0].texts}
    assert {f"{merge.left} + {merge.right}, line {merge.rank + 1} of the list" for merge in word.merges} <= notes


def test_ladder_counts_bytes() -> None:
    (word,) = CLIP.explain("é").words
    assert [(start, width) for _, _, start, width in cells(plots.bpe_ladder(word))] == [(0, 1), (1, 1)]


def test_lattice_shows_every_piece_and_fills_the_best_path() -> None:
    (word,) = T5.explain("greenish").words
    figure = plots.unigram_lattice(word)
    shown = {(text.split("\n")[0], start, width) for text, _, start, width in cells(figure)}
    assert shown == {(each.piece, each.start, each.end - each.start) for each in word.lattice}
    filled = [text.split("\n")[0] for text, color, *_ in sorted(cells(figure), key=lambda cell: cell[2]) if color == BLUE.lower()]
    assert filled == [each.piece for each in word.path]
    assert f"{word.score:.2f}" in figure.axes[0].get_title()


def test_no_two_pieces_of_the_lattice_overlap() -> None:
    axes = plots.unigram_lattice(T5.explain("cylindrical").words[0]).axes[0]
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    for index, first in enumerate(boxes):
        for second in boxes[index + 1 :]:
            apart = first.get_x() + first.get_width() <= second.get_x() or second.get_x() + second.get_width() <= first.get_x()
            assert apart or first.get_y() != second.get_y()


def test_lattice_marks_an_unknown_character() -> None:
    assert [color for text, color, *_ in cells(plots.unigram_lattice(T5.explain("è").words[0])) if text.startswith("è")] == [ORANGE.lower()]


def test_lattice_of_a_special_token_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a word with a lattice, got the special token '</s>'"):
        plots.unigram_lattice(T5.explain("</s>").words[0])


def test_strips_show_pieces_ids_and_kinds() -> None:
    text = "a red cube, sphère $1$"
    figure = plots.token_strips({"CLIP": CLIP.explain(text), "T5": T5.explain(text)})
    assert [each for each, *_ in cells(figure)] == [*CLIP.explain(text).pieces, *T5.explain(text).pieces]
    written = [each.get_text() for each in figure.axes[0].texts]
    assert {"CLIP", "T5", *map(str, T5.explain(text).ids)} <= set(written)
    colors = [(each, color) for each, color, *_ in cells(figure)]
    assert ("è", ORANGE.lower()) in colors
    assert [each for each, color in colors if color == FAINT] == ["<|startoftext|>", "<|endoftext|>", "</s>"]


def test_long_strips_are_wrapped() -> None:
    figure = plots.token_strips({"CLIP": CLIP.explain("a large shiny red sphere " * 6), "T5": T5.explain("x" * 200 + "球" * 300)})
    assert max(start + width for _, _, start, width in cells(figure)) <= WIDTH
    assert len({patch.get_y() for patch in figure.axes[0].patches}) > 3


def test_slots_in_order() -> None:
    kinds = ["start", "text", "text", "end", "padding", "padding", "padding"]
    shown = cells(plots.slot_grid({"CLIP": kinds, "T5": kinds[1:4]}, across=4))
    assert [text for text, *_ in shown] == [SLOTS[kind][1] for kind in [*kinds, *kinds[1:4]]]
    assert [start for _, _, start, _ in shown[:7]] == [0, 1, 2, 3, 0, 1, 2]


def test_unknown_slot_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rows: 'CLIP' holds \['word'\], expected \['start', 'text', 'end', 'padding'\]"):
        plots.slot_grid({"CLIP": ["start", "word"]})


def test_bars_have_their_numbers() -> None:
    figure = plots.grouped_bars({"CLIP": {"one": 3, "two": 5}, "T5": {"one": 4, "two": 2.5}}, xlabel="tokens", digits=1)
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [3, 5, 4, 2.5]
    assert [text.get_text() for text in axes.texts] == ["3.0", "5.0", "4.0", "2.5"]
    assert axes.get_xlabel() == "tokens"
    assert {"CLIP", "T5"} == {text.get_text() for text in axes.get_legend().get_texts()}


def test_characters_without_a_picture_are_replaced() -> None:
    assert plots.drawable("a▁球é") == f"a▁{MISSING}é"
    assert PALE in {color for _, color, *_ in cells(plots.token_strips({"": CLIP.explain("球")}))}
