"""The exercises of lesson 01."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from flux_lab.exercises.checking import Exercise, Misconception

Pair = tuple[str, str]

# ---- one merge ----------------------------------------------------------------------------------------------------------


def merge_pair(symbols: list[str], left: str, right: str) -> list[str]:
    """`symbols` with every `left` that is followed by `right` joined to it, from the left."""
    return _scan(symbols, left, right, step=2, joined=left + right)


def _scan(symbols: list[str], left: str, right: str, step: int, joined: str) -> list[str]:
    """Walk from the left, write `joined` where the pair stands, and go on `step` symbols later."""
    merged, place = [], 0
    while place < len(symbols):
        found = symbols[place : place + 2] == [left, right]
        merged.append(joined if found else symbols[place])
        place += step if found else 1
    return merged


def first_only(symbols: list[str], left: str, right: str) -> list[str]:
    for place, pair in enumerate(itertools.pairwise(symbols)):
        if pair == (left, right):
            return [*symbols[:place], left + right, *symbols[place + 2 :]]
    return list(symbols)


def last_dropped(symbols: list[str], left: str, right: str) -> list[str]:
    """What a loop over `len(symbols) - 1` places leaves."""
    merged = merge_pair(symbols, left, right)
    return merged if symbols[-2:] == [left, right] and merged[-1] == left + right else merged[:-1]


def symbol_lists() -> Iterator[dict[str, Any]]:
    yield {"symbols": ["b", "a", "n", "a", "n", "a</w>"], "left": "a", "right": "n"}
    yield {"symbols": ["o", "o", "o", "p", "s</w>"], "left": "o", "right": "o"}
    yield {"symbols": ["t", "e", "s", "t</w>"], "left": "s", "right": "t</w>"}
    yield {"symbols": ["th", "e</w>"], "left": "t", "right": "h"}
    yield {"symbols": ["a</w>"], "left": "a", "right": "a</w>"}


MERGE_PAIR = Exercise(
    name="merge_pair",
    reference=merge_pair,
    cases=symbol_lists,
    misconceptions=(
        Misconception("first only", first_only, "you stop after the first place. One merge joins the pair wherever it stands in the word"),
        Misconception(
            "right half again",
            lambda symbols, left, right: _scan(symbols, left, right, step=1, joined=left + right),
            "the right half of a merged pair is still there as a symbol of its own. After a merge go on two symbols later",
        ),
        Misconception(
            "last dropped",
            last_dropped,
            "the last symbol is lost when it is not part of a merge. A loop over pairs ends one symbol too early",
        ),
        Misconception(
            "from the right",
            lambda symbols, left, right: [each[::-1] for each in merge_pair([s[::-1] for s in symbols[::-1]], right[::-1], left[::-1])][
                ::-1
            ],
            "you merge from the right. Of two places that overlap, as in o o o, the left one is merged",
        ),
        Misconception(
            "half kept",
            lambda symbols, left, right: _scan(symbols, left, right, step=2, joined=left),
            "the right half is gone. The new symbol is both halves, left + right",
        ),
    ),
)


# ---- all merges ---------------------------------------------------------------------------------------------------------


def bpe(symbols: list[str], ranks: dict[Pair, int]) -> list[str]:
    """Merge the pair of lowest rank until no neighbours have a rank."""
    return _merge_while(symbols, ranks, choose=lambda pairs: min(pairs, key=ranks.__getitem__))


def _merge_while(symbols: list[str], ranks: dict[Pair, int], choose: Callable[[list[Pair]], Pair]) -> list[str]:
    symbols = list(symbols)
    while pairs := [pair for pair in itertools.pairwise(symbols) if pair in ranks]:
        symbols = merge_pair(symbols, *choose(pairs))
    return symbols


def one_merge(symbols: list[str], ranks: dict[Pair, int]) -> list[str]:
    pairs = [pair for pair in itertools.pairwise(symbols) if pair in ranks]
    return merge_pair(symbols, *min(pairs, key=ranks.__getitem__)) if pairs else list(symbols)


def longest_piece(symbols: list[str], ranks: dict[Pair, int]) -> list[str]:
    """From the left, always the longest piece that some merge makes."""
    known, pieces, start = {"".join(pair) for pair in ranks}, [], 0
    while start < len(symbols):
        ends = [end for end in range(start + 2, len(symbols) + 1) if "".join(symbols[start:end]) in known]
        end = max(ends, default=start + 1)
        pieces.append("".join(symbols[start:end]))
        start = end
    return pieces


LEARNED = ("n e", "e r</w>", "w er</w>", "l o", "o w", "ne w", "lo w", "w n</w>", "o wn</w>")
RANKS = {tuple(pair.split()): rank for rank, pair in enumerate(LEARNED)}
CUT = ("l o w e r</w>", "n e w e r</w>", "o n e r</w>", "s l o w", "o w n</w>", "x</w>")


def words() -> Iterator[dict[str, Any]]:
    for symbols in CUT:
        yield {"symbols": symbols.split(), "ranks": dict(RANKS)}


BPE = Exercise(
    name="bpe",
    reference=bpe,
    cases=words,
    misconceptions=(
        Misconception(
            "leftmost pair",
            lambda symbols, ranks: _merge_while(symbols, ranks, choose=lambda pairs: pairs[0]),
            "you merge the leftmost pair that is in the list. The pair of lowest rank comes first, wherever it stands",
        ),
        Misconception(
            "highest rank",
            lambda symbols, ranks: _merge_while(symbols, ranks, choose=lambda pairs: max(pairs, key=ranks.__getitem__)),
            "you merge the pair of highest rank. Rank 0 was learned first and goes first",
        ),
        Misconception("one merge", one_merge, "you stop after one merge. Go on until no two neighbours are in the list"),
        Misconception(
            "longest piece",
            longest_piece,
            "you take the longest known piece from the left. BPE looks at neighbours only, and at their rank, not at their length",
        ),
    ),
)


# ---- the best path ------------------------------------------------------------------------------------------------------


def best_path(word: str, scores: dict[str, float]) -> list[str]:
    """The pieces of `word` whose log-probabilities have the highest sum."""
    return max(cuts(word, scores), key=lambda pieces: sum(scores[piece] for piece in pieces))


def cuts(word: str, scores: dict[str, float]) -> Iterator[list[str]]:
    """All ways to put `word` together from known pieces."""
    if not word:
        yield []
    for end in range(1, len(word) + 1):
        if word[:end] in scores:
            yield from ([word[:end], *rest] for rest in cuts(word[end:], scores))


def piece_by_piece(word: str, scores: dict[str, float], worth: Callable[[str], float]) -> list[str]:
    """From the left, always the piece that is worth most by itself."""
    pieces = []
    while word:
        pieces.append(max((word[:end] for end in range(1, len(word) + 1) if word[:end] in scores), key=worth))
        word = word[len(pieces[-1]) :]
    return pieces


# Made so that every usual mistake fails on one of them: word -> log-probabilities.
SCORES = {
    "cones": {"c": -5.0, "o": -4.0, "n": -4.5, "e": -3.0, "s": -3.5, "co": -6.0, "one": -6.5, "con": -9.5, "cone": -13.0},
    "table": {"t": -2.0, "a": -3.0, "b": -3.5, "l": -4.0, "e": -2.5, "tab": -9.0, "ab": -5.0, "able": -8.5},
    "tin": {"t": -2.0, "i": -9.0, "n": -1.0, "ti": -3.0, "in": -8.0, "tin": -20.0},
    "ox": {"o": -2.0, "x": -10.0, "ox": -5.0},
    "a": {"a": -3.0},
}


def scored_words() -> Iterator[dict[str, Any]]:
    for word, scores in SCORES.items():
        yield {"word": word, "scores": dict(scores)}


BEST_PATH = Exercise(
    name="best_path",
    reference=best_path,
    cases=scored_words,
    misconceptions=(
        Misconception(
            "longest first",
            lambda word, scores: piece_by_piece(word, scores, worth=len),
            "you take the longest piece from the left. A long piece may be so rare that shorter ones have the higher sum",
        ),
        Misconception(
            "best first",
            lambda word, scores: piece_by_piece(word, scores, worth=scores.__getitem__),
            "you take the best piece from the left, one at a time. What counts is the sum over the whole word",
        ),
        Misconception(
            "fewest pieces",
            lambda word, scores: min(cuts(word, scores), key=len),
            "you take the cut with the fewest pieces. Their log-probabilities decide, not their number",
        ),
        Misconception(
            "mean",
            lambda word, scores: max(cuts(word, scores), key=lambda pieces: sum(map(scores.get, pieces)) / len(pieces)),
            "you compare the mean. Probabilities of pieces are multiplied, so their logarithms are added up: no division",
        ),
        Misconception(
            "probabilities added",
            lambda word, scores: max(cuts(word, scores), key=lambda pieces: sum(math.exp(scores[piece]) for piece in pieces)),
            "you add probabilities. They are multiplied; the scores are logarithms already, so add those",
        ),
        Misconception(
            "lowest sum",
            lambda word, scores: min(cuts(word, scores), key=lambda pieces: sum(scores[piece] for piece in pieces)),
            "you take the lowest sum. Log-probabilities are negative; the most likely cut has the sum nearest to 0",
        ),
    ),
)


# ---- one length for all -------------------------------------------------------------------------------------------------


def fit_length(ids: list[int], length: int, pad_id: int) -> Tensor:
    """`length` ids, int64 [length]: cut before the end token, or padded behind it."""
    kept = ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]
    return torch.tensor(kept + [pad_id] * (length - len(kept)))


def id_lists() -> Iterator[dict[str, Any]]:
    for count, length, pad_id in ((5, 9, 999), (12, 8, 999), (8, 8, 0), (3, 16, 1), (40, 32, 0)):
        yield {"ids": [998, *range(3, count + 1), 999], "length": length, "pad_id": pad_id}


FIT_LENGTH = Exercise(
    name="fit_length",
    reference=fit_length,
    cases=id_lists,
    misconceptions=(
        Misconception(
            "end token cut off",
            lambda ids, length, pad_id: torch.tensor((ids + [pad_id] * length)[:length]),
            "a text that is too long loses its end token. Cut before it: CLIP pools the vector at the end token",
        ),
        Misconception(
            "padded in front",
            lambda ids, length, pad_id: torch.cat(
                [torch.full((max(length - len(ids), 0),), pad_id), fit_length(ids, min(length, len(ids)), 0)]
            ),
            "the padding stands in front of the text. Both tokenizers of FLUX.1 pad behind the end token",
        ),
        Misconception(
            "padded with 0",
            lambda ids, length, pad_id: fit_length(ids, length, 0),
            "you pad with 0. That is T5's padding; CLIP's is the id of its end token. Use `pad_id`",
        ),
        Misconception(
            "end token last",
            lambda ids, length, pad_id: torch.cat([fit_length([*ids[:-1], pad_id], length, pad_id)[:-1], torch.tensor(ids[-1:])]),
            "you moved the end token into the last slot. It follows the text, and the padding follows it",
        ),
        Misconception(
            "beginning cut off",
            lambda ids, length, pad_id: torch.tensor((ids + [pad_id] * (length - len(ids)))[-length:]),
            "a text that is too long loses its beginning. Keep the first ids and the end token",
        ),
        Misconception(
            "never cut",
            lambda ids, length, pad_id: torch.tensor(ids + [pad_id] * (length - len(ids))),
            "you pad, but never cut. A text that is too long must come down to `length` ids too",
        ),
    ),
)

EXERCISES = (MERGE_PAIR, BPE, BEST_PATH, FIT_LENGTH)
