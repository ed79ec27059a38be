"""CLIP's tokenizer: text to ids by byte-level byte-pair encoding (BPE).

Five steps, which `explain` shows one by one:

1. special tokens that are written out in the text are cut out;
2. the rest is cleaned: Unicode NFC, white space collapsed, lower case;
3. it is split into words: runs of letters, single digits, runs of anything else;
4. each word is spelled in bytes, every byte one visible symbol, and the last symbol ends in `</w>`;
5. neighbouring symbols are merged, always the pair that comes first in the list of merges, until no pair is in the list.

Gives the ids of transformers' `CLIPTokenizer`, except for characters that are newer than Python's Unicode tables (`unicodedata`).
"""

import functools
import heapq
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from tokenizers.normalizers import NFC

from flux_lab.tokenizer import (
    WHITE_SPACE,
    SpecialToken,
    Tokenizer,
    check_text,
    max_length_of,
    names_of,
    read_config,
    read_json,
    read_special_tokens,
)

END_OF_WORD = "</w>"
DEFAULT_NAMES = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}

_SPELLED_OUT = re.compile(r"<\|(startoftext|endoftext)\|>")
_CONTRACTION = re.compile(r"'(?:s|t|re|ve|m|ll|d)")


class Merge(NamedTuple):
    """One merge: the pair became one symbol. `rank` is its line in merges.txt, from 0; `start` the place of its first byte in the word."""

    left: str
    right: str
    rank: int
    start: int


@dataclass(frozen=True)
class Word:
    """One word on its way to ids. A special token is one symbol and has no merges."""

    text: str
    symbols: tuple[str, ...]
    merges: tuple[Merge, ...]
    pieces: tuple[str, ...]
    ids: tuple[int, ...]

    def stages(self) -> Iterator[tuple[str, ...]]:
        """The symbols before the first merge, and after each one."""
        current = dict(enumerate(self.symbols))
        yield tuple(current.values())
        for merge in self.merges:
            following = next(place for place in current if place > merge.start)
            current[merge.start] += current.pop(following)
            yield tuple(current.values())


@dataclass(frozen=True)
class Explanation:
    """The steps from a text to its ids. `pieces` and `ids` have the start and the end token too."""

    text: str
    cleaned: str
    words: tuple[Word, ...]
    pieces: tuple[str, ...]
    ids: tuple[int, ...]


def clean_text(text: str) -> str:
    """Unicode NFC, every run of white space one space, lower case letter by letter: `str.lower` changes a final sigma otherwise.

    NFC is that of the library `tokenizers`: its tables are Unicode 9's, and `unicodedata` orders the combining marks added since otherwise.
    """
    text = re.sub(f"[{WHITE_SPACE}]+", " ", NFC().normalize_str(text))
    return "".join(character.lower() for character in text)


def split_words(text: str) -> list[str]:
    r"""The words of a cleaned text, as the published pattern finds them:

        <\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+

    `\p{L}` are letters, `\p{N}` digits. Upstream then splits again by GPT-2's pattern, which only takes the first two apart.
    """
    words, start = [], 0
    while start < len(text):
        kind, end = _kind(text[start]), start + 1
        if match := _SPELLED_OUT.match(text, start):
            words += ["<|", match.group(1), "|>"]
            end = match.end()
        elif match := _CONTRACTION.match(text, start):
            words.append(match.group())
            end = match.end()
        elif kind != "space":
            while kind != "digit" and end < len(text) and _kind(text[end]) == kind:
                end += 1
            words.append(text[start:end])
        start = end
    return words


@functools.lru_cache(maxsize=4096)
def _kind(character: str) -> str:
    if character in WHITE_SPACE:
        return "space"
    return {"L": "letter", "N": "digit"}.get(unicodedata.category(character)[0], "other")


@functools.cache
def bytes_to_unicode() -> dict[int, str]:
    """A visible character for each of the 256 bytes: its own where that is printable Latin-1, else the next from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


def spell(word: str) -> list[str]:
    """A word as byte symbols, the last one with `</w>`."""
    symbols = [bytes_to_unicode()[byte] for byte in word.encode("utf-8")]
    return [*symbols[:-1], symbols[-1] + END_OF_WORD]


def merge_symbols(symbols: Sequence[str], ranks: dict[tuple[str, str], int]) -> tuple[list[str], list[Merge]]:
    """Byte-pair encoding (Sennrich et al. 2016): merge the pair of lowest rank, of equals the leftmost, until no pair has a rank.

    The symbols are a linked list: a merged symbol stays at the place of its left half and None takes that of the right one. A heap
    holds the pairs that can be merged. So n symbols take O(n log n).
    """
    current: list[str | None] = list(symbols)
    before, after = list(range(-1, len(current) - 1)), list(range(1, len(current) + 1))
    queue: list[tuple[int, int, int, str, str]] = []
    merges = []

    def consider(left: int, right: int) -> None:
        if left >= 0 and right < len(current) and (rank := ranks.get((current[left], current[right]))) is not None:
            heapq.heappush(queue, (rank, left, right, current[left], current[right]))

    for place in range(len(current) - 1):
        consider(place, place + 1)
    while queue:
        rank, left, right, left_symbol, right_symbol = heapq.heappop(queue)
        if current[left] != left_symbol or current[right] != right_symbol:
            continue  # one of the two has been merged with its other neighbour
        merges.append(Merge(left_symbol, right_symbol, rank, left))
        current[left], current[right] = left_symbol + right_symbol, None
        after[left] = after[right]
        if after[left] < len(current):
            before[after[left]] = left
        consider(before[left], left)
        consider(left, after[left])
    return [symbol for symbol in current if symbol is not None], merges


class CLIPTokenizer(Tokenizer):
    """Text to ids and back. `model_max_length` is the length of CLIP's input, 77.

    `tokenizer("a red cube")` -> int64 [1, 77]: start token, text, end token, padding.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: Sequence[tuple[str, str]],
        special_tokens: Sequence[SpecialToken],
        names: dict[str, str] = DEFAULT_NAMES,
        model_max_length: int = 77,
    ):
        super().__init__(vocab, special_tokens, names, model_max_length)
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read `tokenizer.json`, or `vocab.json` and `merges.txt` where it is not there, and `tokenizer_config.json`.

        Raises FileNotFoundError for a missing folder or file, ValueError for a file that is malformed.
        """
        folder = Path(folder)
        config = read_config(folder)
        vocab, merges = _read_tokenizer_json(folder) if (folder / "tokenizer.json").is_file() else _read_vocab_and_merges(folder)
        names = names_of(config, DEFAULT_NAMES)
        for name in DEFAULT_NAMES:
            if names[name] not in vocab:
                raise ValueError(f"{folder}: {name} {names[name]!r} is not in the vocabulary")
        special_tokens = read_special_tokens(folder, config, names.values(), vocab)
        return cls(vocab, merges, special_tokens, names, max_length_of(config, default=77))

    def clean(self, text: str) -> str:
        return clean_text(text)

    def explain(self, text: str) -> Explanation:
        """All steps from one text to its ids, which are neither padded nor truncated. Raises TypeError when `text` is no string."""
        words, cleaned = [], []
        for part in self.special_tokens.split(check_text(text)):
            if isinstance(part, SpecialToken):
                cleaned.append(part.content)
                words.append(Word(part.content, (part.content,), (), (part.content,), (part.id,)))
            else:
                cleaned.append(part)
                words += [self._word(word) for word in split_words(part)]
        ids = (self.bos_token_id, *(index for word in words for index in word.ids), self.eos_token_id)
        return Explanation(text, "".join(cleaned), tuple(words), tuple(self.pieces_of(ids)), ids)

    def _word(self, text: str) -> Word:
        symbols = spell(text)
        pieces, merges = merge_symbols(symbols, self.ranks)
        ids = tuple(self.vocab.get(piece, self.unk_token_id) for piece in pieces)
        return Word(text, tuple(symbols), tuple(merges), tuple(pieces), ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids, special tokens included; bytes that are no UTF-8 become U+FFFD. Not the text that went in: it is cleaned.

        Raises ValueError for an id that is not in the vocabulary.
        """
        to_byte = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
        spelled = b""
        for piece in self.pieces_of(ids):
            known = all(symbol in to_byte for symbol in piece)
            spelled += bytes(to_byte[symbol] for symbol in piece) if known else piece.encode("utf-8")
        return spelled.decode("utf-8", errors="replace").replace(END_OF_WORD, " ").strip()


def _read_vocab_and_merges(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    vocab = _check_vocab(read_json(folder / "vocab.json"), folder / "vocab.json")
    path = folder / "merges.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with path.open(encoding="utf-8") as file:
            lines = [line.rstrip("\n") for line in file if not line.startswith("#version")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from None
    return vocab, _check_merges([line.split(" ") for line in lines], vocab, path)


def _read_tokenizer_json(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    path = folder / "tokenizer.json"
    model = read_json(path).get("model") or {}
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"{path}: model type {model['type']!r}, expected 'BPE'")
    vocab = _check_vocab(model.get("vocab"), path)
    return vocab, _check_merges([pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", [])], vocab, path)


def _check_vocab(vocab: dict[str, int], path: Path) -> dict[str, int]:
    if not isinstance(vocab, dict) or not vocab:
        raise ValueError(f"{path}: expected a dict of piece -> id, got {type(vocab).__name__}")
    for piece, index in vocab.items():
        if not isinstance(index, int) or index < 0:
            raise ValueError(f"{path}: id of {piece!r}: expected an integer of at least 0, got {index!r}")
    if len(set(vocab.values())) < len(vocab):
        raise ValueError(f"{path}: expected one id for each piece, got {len(vocab)} pieces with {len(set(vocab.values()))} ids")
    return vocab


def _check_merges(merges: list[list[str]], vocab: dict[str, int], path: Path) -> list[tuple[str, str]]:
    for rank, pair in enumerate(merges):
        if len(pair) != 2:
            raise ValueError(f"{path}: merge {rank}: expected two symbols, got {pair}")
        for piece in (*pair, "".join(pair)):
            if piece not in vocab:
                raise ValueError(f"{path}: merge {rank}, {pair}: {piece!r} is not in the vocabulary")
    return [tuple(pair) for pair in merges]
