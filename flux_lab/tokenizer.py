"""What the two tokenizers share: special tokens, the files of a tokenizer's folder, padding and truncation."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from flux_lab.shapes import shaped

# Unicode's property White_Space. Python's `\s` and `str.split()` take U+001C to U+001F as well.
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class SpecialToken:
    """A token that is found in the text as it is written, or with `normalized` as it is after cleaning.

    With `lstrip` and `rstrip` it takes the white space on that side of it.
    """

    content: str
    id: int
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


class SpecialTokens:
    """Cuts a text at its special tokens. Source: `AddedVocabulary` of the library `tokenizers`."""

    def __init__(self, tokens: Iterable[SpecialToken], clean: Callable[[str], str]):
        tokens = list(tokens)
        self.clean = clean
        self.in_text = {token.content: token for token in tokens if not token.normalized}
        self.in_cleaned = {clean(token.content): token for token in tokens if token.normalized}

    def split(self, text: str) -> Iterator[str | SpecialToken]:
        """The special tokens of `text`, and between them what is left of it, cleaned."""
        for part in _cut(text, self.in_text):
            if isinstance(part, SpecialToken):
                yield part
            else:
                yield from _cut(self.clean(part), self.in_cleaned)


def _cut(text: str, tokens: dict[str, SpecialToken]) -> Iterator[str | SpecialToken]:
    """Cut at the leftmost token, and of those that start at one place at the longest."""
    start = 0
    for match in re.finditer("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)", text):
        token = tokens[match.group()]
        between = text[start : match.start()]
        yield from filter(None, [between.rstrip(WHITE_SPACE) if token.lstrip else between])
        yield token
        start = match.end()
        while token.rstrip and start < len(text) and text[start] in WHITE_SPACE:
            start += 1
    yield from filter(None, [text[start:]])


class Tokenizer:
    """Base of both tokenizers. A subclass has `explain`, `decode` and `from_pretrained`.

    `vocab`: piece -> id, without the special tokens; `names`: `bos_token` and so on -> piece.
    """

    def __init__(self, vocab: dict[str, int], special_tokens: Iterable[SpecialToken], names: dict[str, str], model_max_length: int):
        special_tokens = list(special_tokens)
        self.vocab = vocab | {token.content: token.id for token in special_tokens}
        self.pieces = {index: piece for piece, index in self.vocab.items()}
        self.special_tokens = SpecialTokens(special_tokens, self.clean)
        self.model_max_length = model_max_length
        for name, piece in names.items():
            setattr(self, f"{name}_id", self.vocab[piece])

    def clean(self, text: str) -> str:
        """The text as the words are looked for in it."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """The ids of one text, with its end token, neither padded nor truncated."""
        return list(self.explain(text).ids)

    @shaped
    def __call__(self, text: str | Sequence[str], max_length: int | None = None) -> Int[Tensor, "batch length"]:
        """The ids of one or several texts, int64, every row of `max_length` ids (`model_max_length` by default).

        A longer text loses ids before its end token, a shorter one is padded after it. Raises TypeError when `text` is no string or list
        of strings, ValueError for an empty list or a length that has no room for the start and end token.
        """
        length = self.model_max_length if max_length is None else max_length
        if not isinstance(length, int) or length < 2:
            raise ValueError(f"max_length: expected an integer of at least 2, got {length!r}")
        rows = [self.encode(item) for item in check_texts(text)]
        rows = [ids if len(ids) <= length else [*ids[: length - 1], ids[-1]] for ids in rows]
        return torch.tensor([ids + [self.pad_token_id] * (length - len(ids)) for ids in rows], dtype=torch.int64)

    def pieces_of(self, ids: Iterable[int]) -> list[str]:
        """The pieces of these ids (a list or a tensor of one axis). Raises ValueError for an id that is not in the vocabulary."""
        ids = [int(index) for index in ids]
        for index in ids:
            if index not in self.pieces:
                raise ValueError(f"ids: {index} is not in the vocabulary, expected 0 to {max(self.pieces)}")
        return [self.pieces[index] for index in ids]


def check_texts(text: str | Sequence[str], argument: str = "text") -> list[str]:
    """One string or several, as a list. Raises TypeError for anything else, ValueError for an empty list."""
    if isinstance(text, str):
        return [check_text(text, argument)]
    if not isinstance(text, list | tuple):
        raise TypeError(f"{argument}: expected a string or a list of strings, got {type(text).__name__}")
    if not text:
        raise ValueError(f"{argument}: expected at least one string, got an empty list")
    return [check_text(item, f"{argument}[{index}]") for index, item in enumerate(text)]


def check_text(text: str, argument: str = "text") -> str:
    """Return `text`. Raises TypeError when it is no string, ValueError when it is not valid Unicode."""
    if not isinstance(text, str):
        raise TypeError(f"{argument}: expected a string, got {type(text).__name__}")
    if lone := re.search("[\ud800-\udfff]", text):
        raise ValueError(
            f"{argument}: expected valid Unicode, got the lone surrogate U+{ord(lone.group()):04X} at character {lone.start()}"
        )
    return text


def read_json(path: Path) -> Any:
    """Parse a json file. Raises FileNotFoundError or, when it is malformed, ValueError: both name it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a json file: {error}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, with the named tokens of the older `special_tokens_map.json`; {} where neither is there.

    Raises FileNotFoundError for a folder that does not exist, ValueError for a setting that we do not support.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"tokenizer folder {folder} does not exist")
    path, older = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    config = read_json(path) if path.is_file() else {}
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a json object, got {type(config).__name__}")
    if "added_tokens_decoder" not in config and older.is_file():
        config |= read_json(older)
    for side in ("padding_side", "truncation_side"):
        if config.get(side, "right") != "right":
            raise ValueError(f"{path}: {side}={config[side]!r} is not supported, expected 'right'")
    return config


def max_length_of(config: dict[str, Any], default: int) -> int:
    """`model_max_length`; `default` where it is missing or the huge number that stands for "no limit"."""
    length = config.get("model_max_length") or default
    return default if length > 10**6 else int(length)


def names_of(config: dict[str, Any], defaults: dict[str, str]) -> dict[str, str]:
    """`bos_token` and so on -> its text. The json has the text, or a dict that holds it."""
    return defaults | {name: content_of(config[name]) for name in NAMED_TOKENS if config.get(name)}


def content_of(token: str | dict[str, Any]) -> str:
    """The text of a token in the json of a tokenizer."""
    return token["content"] if isinstance(token, dict) else token


def read_special_tokens(folder: Path, config: dict[str, Any], contents: Iterable[str], vocab: dict[str, int]) -> list[SpecialToken]:
    """The tokens declared in the folder, and those of `contents`. One that is not in `vocab` gets the next free id.

    Source: transformers `PreTrainedTokenizerBase._from_pretrained`: `added_tokens_decoder` of the configuration counts, where it is there.
    """
    declared = [config[name] for name in NAMED_TOKENS if isinstance(config.get(name), dict)]
    if "added_tokens_decoder" in config:
        declared += config["added_tokens_decoder"].values()
    elif (folder / "tokenizer.json").is_file():
        declared += read_json(folder / "tokenizer.json").get("added_tokens", [])
    flags = {token["content"]: token for token in declared}
    ids = dict(vocab)
    return [_special_token(content, ids, flags.get(content, {})) for content in dict.fromkeys([*flags, *contents])]


def _special_token(content: str, ids: dict[str, int], flags: dict[str, Any]) -> SpecialToken:
    if flags.get("single_word"):
        raise ValueError(f"special token {content!r}: single_word=True is not supported")
    return SpecialToken(
        content=content,
        id=ids.setdefault(content, len(ids)),
        lstrip=flags.get("lstrip", False),
        rstrip=flags.get("rstrip", False),
        normalized=flags.get("normalized", not flags.get("special", True)),
    )
