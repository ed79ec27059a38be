"""Lesson 01."""

import functools
import math
import re

import torch


def joined(symbols, left, right, count=0, half=False):
    """Symbols as one string between bars, the pair replaced by a regular expression; count 0 replaces all."""
    text = "|" + "||".join(symbols) + "|"
    new = left if half else left + right
    return re.findall(r"\|([^|]+)\|", re.sub(re.escape(f"|{left}||{right}|"), f"|{new}|", text, count=count))


def right_half_again(symbols, left, right):
    pairs = zip(symbols, [*symbols[1:], None], strict=True)
    return [one + two if (one, two) == (left, right) else one for one, two in pairs]


def last_dropped(symbols, left, right):
    result, skip = [], False
    for place in range(len(symbols) - 1):
        if skip:
            skip = False
        elif symbols[place] == left and symbols[place + 1] == right:
            result.append(left + right)
            skip = True
        else:
            result.append(symbols[place])
    return result


def from_the_right(symbols, left, right):
    rest, result = list(symbols), []
    while rest:
        last = rest.pop()
        if rest and (rest[-1], last) == (left, right):
            last = rest.pop() + last
        result.insert(0, last)
    return result


def any_order(symbols, ranks, best, times=99):
    for _ in range(times):
        pairs = [(symbols[i], symbols[i + 1]) for i in range(len(symbols) - 1) if (symbols[i], symbols[i + 1]) in ranks]
        if not pairs:
            break
        symbols = joined(symbols, *best(pairs))
    return list(symbols)


def longest_piece(symbols, ranks):
    if not symbols:
        return []
    pieces = {left + right for left, right in ranks}
    end = len(symbols)
    while end > 1 and "".join(symbols[:end]) not in pieces:
        end -= 1
    return ["".join(symbols[:end]), *longest_piece(symbols[end:], ranks)]


def all_cuts(word, scores):
    for bits in range(2 ** (len(word) - 1)):
        pieces = [""]
        for place, character in enumerate(word):
            pieces[-1] += character
            if bits >> place & 1 and place < len(word) - 1:
                pieces.append("")
        if all(piece in scores for piece in pieces):
            yield pieces


def ranked(word, scores, worth):
    return sorted(all_cuts(word, scores), key=lambda pieces: worth([scores[piece] for piece in pieces]))[-1]


def from_the_left(word, scores, worth):
    if not word:
        return []
    first = sorted((piece for piece in scores if word.startswith(piece)), key=worth)[-1]
    return [first, *from_the_left(word[len(first) :], scores, worth)]


def filled(length, pad_id, ids):
    out = torch.full((length,), pad_id, dtype=torch.int64)
    out[: len(ids)] = torch.tensor(ids)
    return out


def padded_in_front(ids, length, pad_id):
    kept = ids[: length - 1] + ids[-1:] if len(ids) > length else ids
    return filled(length, pad_id, kept[::-1]).flip(0)


def end_token_last(ids, length, pad_id):
    out = filled(length, pad_id, ids[:-1][: length - 1])
    out[-1] = ids[-1]
    return out


REWRITTEN = {
    ("merge_pair", "first only"): functools.partial(joined, count=1),
    ("merge_pair", "right half again"): right_half_again,
    ("merge_pair", "last dropped"): last_dropped,
    ("merge_pair", "from the right"): from_the_right,
    ("merge_pair", "half kept"): functools.partial(joined, half=True),
    ("bpe", "leftmost pair"): lambda symbols, ranks: any_order(symbols, ranks, best=lambda pairs: next(iter(pairs))),
    ("bpe", "highest rank"): lambda symbols, ranks: any_order(symbols, ranks, best=lambda pairs: sorted(pairs, key=lambda p: -ranks[p])[0]),
    ("bpe", "one merge"): lambda symbols, ranks: any_order(symbols, ranks, lambda pairs: sorted(pairs, key=ranks.get)[0], times=1),
    ("bpe", "longest piece"): longest_piece,
    ("best_path", "longest first"): lambda word, scores: from_the_left(word, scores, worth=len),
    ("best_path", "best first"): lambda word, scores: from_the_left(word, scores, worth=scores.get),
    ("best_path", "fewest pieces"): lambda word, scores: ranked(word, scores, worth=lambda values: -len(values)),
    ("best_path", "mean"): lambda word, scores: ranked(word, scores, worth=lambda values: torch.tensor(values).mean()),
    ("best_path", "probabilities added"): lambda word, scores: ranked(word, scores, worth=lambda values: math.fsum(map(math.exp, values))),
    ("best_path", "lowest sum"): lambda word, scores: ranked(word, scores, worth=lambda values: -math.fsum(values)),
    ("fit_length", "end token cut off"): lambda ids, length, pad_id: filled(length, pad_id, ids[:length]),
    ("fit_length", "padded in front"): padded_in_front,
    ("fit_length", "padded with 0"): lambda ids, length, pad_id: filled(length, 0, ids[: length - 1] + ids[length - 1 :][-1:]),
    ("fit_length", "end token last"): end_token_last,
    ("fit_length", "beginning cut off"): lambda ids, length, pad_id: filled(length, pad_id, ids[max(len(ids) - length, 0) :]),
    ("fit_length", "never cut"): lambda ids, length, pad_id: filled(max(length, len(ids)), pad_id, ids),
}
