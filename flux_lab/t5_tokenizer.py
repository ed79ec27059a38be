"""T5's tokenizer: text to ids by a unigram language model.

Every piece of the vocabulary has a log-probability. Of all the ways to put a word together from pieces the one with the highest sum is
taken; the Viterbi algorithm finds it in one pass. The steps, which `explain` shows one by one:

1. special tokens that are written out in the text are cut out;
2. the rest is normalised by the character map `nmt_nfkc` that comes with the vocabulary (the library `tokenizers` applies it);
3. it is split at white space, and each word gets a `▁` in front that stands for the space;
4. the lattice of all pieces that fit somewhere in the word; a character that no piece covers becomes an unknown one;
5. the best path, with neighbouring unknown pieces made one.

Gives the ids of transformers' `T5Tokenizer` (`T5TokenizerFast` is the same class).
"""

import base64
import binascii
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from tokenizers.normalizers import Precompiled

from flux_lab.sentencepiece_model import CONTROL, USER_DEFINED, read_sentencepiece_model
from flux_lab.tokenizer import (
    WHITE_SPACE,
    SpecialToken,
    Tokenizer,
    check_text,
    content_of,
    max_length_of,
    names_of,
    read_config,
    read_json,
    read_special_tokens,
)

METASPACE = "▁"
UNKNOWN_PENALTY = 10.0
DEFAULT_NAMES = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
UNKNOWN_ID = 2


class Candidate(NamedTuple):
    """A piece that fits into the word at characters start to end; `id` 2 and the penalised score where it is unknown."""

    start: int
    end: int
    piece: str
    id: int
    score: float


@dataclass(frozen=True)
class Word:
    """One word on its way to ids: its lattice, and the best path through it. A special token is a path of one."""

    text: str
    lattice: tuple[Candidate, ...]
    path: tuple[Candidate, ...]

    @property
    def score(self) -> float:
        """Log-probability of the best path."""
        return sum(candidate.score for candidate in self.path)

    def fused(self) -> list[tuple[str, int]]:
        """Pieces and ids of the path, neighbouring unknown ones made one."""
        result: list[tuple[str, int]] = []
        for candidate in self.path:
            if result and candidate.id == UNKNOWN_ID == result[-1][1]:
                result[-1] = (result[-1][0] + candidate.piece, UNKNOWN_ID)
            else:
                result.append((candidate.piece, candidate.id))
        return result


@dataclass(frozen=True)
class Explanation:
    """The steps from a text to its ids. `pieces` and `ids` have the end token too."""

    text: str
    normalized: str
    words: tuple[Word, ...]
    pieces: tuple[str, ...]
    ids: tuple[int, ...]


def split_words(text: str) -> list[str]:
    """Split at white space, put `▁` in front of each word that has none, and split again in front of every `▁`."""
    words = [word if word.startswith(METASPACE) else METASPACE + word for word in re.split(f"[{WHITE_SPACE}]+", text) if word]
    return [part for word in words for part in re.findall(f"{METASPACE}[^{METASPACE}]*", word)]


def best_path(candidates: Sequence[Candidate], length: int) -> list[Candidate]:
    """The path from 0 to `length` with the highest sum of scores (Viterbi); of equals the one whose last piece is longest.

    Candidates come in the order of their start, so the best sum up to a start is known before a piece goes on from there.
    """
    best: list[tuple[float, Candidate | None]] = [(float("-inf"), None)] * (length + 1)
    best[0] = (0.0, None)
    for candidate in candidates:
        total = candidate.score + best[candidate.start][0]
        if best[candidate.end][1] is None or total > best[candidate.end][0]:
            best[candidate.end] = (total, candidate)
    path: list[Candidate] = []
    while length > 0:
        path.append(best[length][1])
        length = path[-1].start
    return path[::-1]


class T5Tokenizer(Tokenizer):
    """Text to ids and back. `model_max_length` is 512 for FLUX.1.

    `tokenizer("a red cube", max_length=256)` -> int64 [1, 256]: text, end token, padding with 0.
    """

    def __init__(
        self,
        vocab: Sequence[tuple[str, float]],
        special_tokens: Sequence[SpecialToken],
        charsmap: bytes | None = None,
        names: dict[str, str] = DEFAULT_NAMES,
        model_max_length: int = 512,
    ):
        """`vocab`: pieces with their log-probability, in the order of their ids; `charsmap`: sentencepiece's compiled character map."""
        self.normalizer = Precompiled(charsmap) if charsmap else None
        super().__init__({piece: index for index, (piece, _) in enumerate(vocab)}, special_tokens, names, model_max_length)
        self.scores = {piece: (index, score) for index, (piece, score) in enumerate(vocab)}
        self.longest = max(map(len, self.scores))
        self.unknown_score = min(score for _, score in vocab) - UNKNOWN_PENALTY

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read `tokenizer.json`, or `spiece.model` where it is not there, and `tokenizer_config.json`.

        Raises FileNotFoundError for a missing folder or file, ValueError for a file that is malformed.
        """
        folder = Path(folder)
        config = read_config(folder)
        extra_ids = [f"<extra_id_{index}>" for index in range(config.get("extra_ids", 100))]
        path = folder / "tokenizer.json"
        if path.is_file():
            (vocab, charsmap), extras = _read_tokenizer_json(path), extra_ids
        else:
            path = folder / "spiece.model"
            model = read_sentencepiece_model(path)
            vocab = [(piece.text, piece.score) for piece in model.pieces] + [(token, 0.0) for token in reversed(extra_ids)]
            charsmap, extras = model.charsmap, [piece.text for piece in model.pieces if piece.type in (CONTROL, USER_DEFINED)] + extra_ids
        names = names_of(config, DEFAULT_NAMES)
        _check_vocab(vocab, names, path)
        # The new and the old name of one field.
        declared = [config[key] or [] for key in ("extra_special_tokens", "additional_special_tokens") if key in config]
        contents = [*names.values(), *map(content_of, max(declared, key=len, default=extras))]
        special_tokens = read_special_tokens(folder, config, contents, {piece: index for index, (piece, _) in enumerate(vocab)})
        return cls(vocab, special_tokens, charsmap, names, max_length_of(config, default=512))

    def clean(self, text: str) -> str:
        return self.normalizer.normalize_str(text) if self.normalizer else text

    def lattice(self, word: str) -> Iterator[Candidate]:
        """All pieces that fit, by their start and then by their length. Where no piece covers the first character alone, an unknown one."""
        for start in range(len(word)):
            single = False
            for end in range(start + 1, min(start + self.longest, len(word)) + 1):
                if (found := self.scores.get(word[start:end])) is not None:
                    yield Candidate(start, end, word[start:end], *found)
                    single |= end == start + 1
            if not single:
                yield Candidate(start, start + 1, word[start], UNKNOWN_ID, self.unknown_score)

    def explain(self, text: str) -> Explanation:
        """All steps from one text to its ids, which are neither padded nor truncated. Raises TypeError when `text` is no string."""
        words, normalized = [], []
        for part in self.special_tokens.split(check_text(text)):
            if isinstance(part, SpecialToken):
                normalized.append(part.content)
                words.append(Word(part.content, (), (Candidate(0, len(part.content), part.content, part.id, 0.0),)))
            else:
                normalized.append(part)
                words += map(self._word, split_words(part))
        fused = [pair for word in words for pair in word.fused()]
        end = (self.pieces[self.eos_token_id], self.eos_token_id)
        pieces, ids = zip(*fused, end, strict=True)
        return Explanation(text, "".join(normalized), tuple(words), pieces, ids)

    def _word(self, text: str) -> Word:
        lattice = tuple(self.lattice(text))
        return Word(text, lattice, tuple(best_path(lattice, len(text))))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids, special tokens included. Not the text that went in: it is normalised.

        Raises ValueError for an id that is not in the vocabulary.
        """
        pieces = self.pieces_of(ids)
        return "".join([piece.replace(METASPACE, "" if index == 0 else " ") for index, piece in enumerate(pieces)])


def _read_tokenizer_json(path: Path) -> tuple[list[tuple[str, float]], bytes | None]:
    values = read_json(path)
    model = values.get("model") or {}
    if model.get("type") != "Unigram":
        raise ValueError(f"{path}: model type {model.get('type')!r}, expected 'Unigram'")
    try:
        vocab = [(str(piece), float(score)) for piece, score in model["vocab"]]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: expected model.vocab to be a list of [piece, score]") from None
    return vocab, _charsmap_of(values.get("normalizer"), path)


def _charsmap_of(normalizer: dict[str, Any] | None, path: Path) -> bytes | None:
    """The character map in the normaliser's json: the first one of type Precompiled, alone or in a Sequence."""
    for step in (normalizer or {}).get("normalizers", [normalizer or {}]):
        if step.get("type") == "Precompiled":
            try:
                return base64.b64decode(step["precompiled_charsmap"], validate=True)
            except (KeyError, TypeError, binascii.Error) as error:
                raise ValueError(f"{path}: precompiled_charsmap is not base64: {error}") from None
    return None


def _check_vocab(vocab: list[tuple[str, float]], names: dict[str, str], path: Path) -> None:
    first = [piece for piece, _ in vocab[:3]]
    expected = [names["pad_token"], names["eos_token"], names["unk_token"]]
    if first != expected:
        raise ValueError(f"{path}: expected the first pieces to be {expected}, got {first}")
