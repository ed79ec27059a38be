"""Texts and vocabularies that the tests of both tokenizers share."""

import gzip
import importlib.util
import json
import os
import random
import sysconfig
import unicodedata
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
CAPTIONS = [
    "a red cube",
    "A large shiny RED sphere left of a small blue cube, on a wooden floor.",
    "don't they've 1234 cats!?",
    "naïve café — Ελλάς ΣΑΣ",
]
SPECIAL = [
    "<|startoftext|>",
    "<|endoftext|>",
    "<|ENDOFTEXT|>",
    "<|",
    "|>",
    "</s>",
    "<pad>",
    "<unk>",
    "<extra_id_0>",
    "<extra_id_11>",
    "<extra_id_99>",
    "＜/s＞",
    "</w>",
    "▁",
    "'s",
    "'LL",
    "'",
]
EMOJI = ["🎨", "👩‍🚀", "🇨🇭", "👍🏽", "❤️", "1️⃣", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "😀"]
BLOCKS = {
    "latin": "\u00c0-\u024f",
    "greek": "\u0370-\u03ff",
    "cyrillic": "\u0400-\u052f",
    "hebrew": "\u0590-\u05ff",
    "arabic": "\u0600-\u06ff",
    "indic": "\u0900-\u0dff",
    "thai": "\u0e00-\u0eff",
    "hangul": "\u1100-\u11ff\uac00-\ud7a3",
    "kana": "\u3040-\u30ff",
    "han": "\u4e00-\u9fff",
    "combining": "\u0300-\u036f",
    "half and full width": "\uff00-\uffef",
    "mathematical": "\U0001d400-\U0001d7ff",
    "control": "\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\ufeff\ufffd",
    "space": " \t\n\v\f\r\x1c\x1f\x85\xa0\u1680\u180e\u2000-\u200b\u2028\u2029\u202f\u205f\u3000",
}


@cache
def characters_of(block: str) -> list[str]:
    """The assigned characters of a block that is written like a regular expression's class."""
    found, place = [], 0
    while place < len(block):
        last = block[place + 2] if block[place + 1 : place + 2] == "-" else block[place]
        found += map(chr, range(ord(block[place]), ord(last) + 1))
        place += 3 if last != block[place] else 1
    return [character for character in found if unicodedata.category(character) not in ("Cn", "Cs")]


@cache
def assigned() -> list[str]:
    """Every assigned code point but surrogates."""
    return [chr(point) for point in range(0x110000) if unicodedata.category(chr(point)) not in ("Cn", "Cs")]


def random_text(rng: random.Random) -> str:
    """Up to 12 parts: words of many scripts, any code points, emoji, right-to-left, control characters, special tokens; sometimes none."""
    letters = [*map(characters_of, BLOCKS.values()), list(map(chr, range(33, 127))), assigned()]
    parts = [CAPTIONS, SPECIAL, EMOJI, [" ", "  ", "\n"]]
    text = ""
    for _ in range(rng.randint(0, 12)):
        chosen = rng.choice([*letters, *parts])
        text += rng.choice(chosen) if any(chosen is part for part in parts) else "".join(rng.choices(chosen, k=rng.randint(0, 7)))
    return text


@cache
def many_texts(count: int) -> list[str]:
    """The same `count` texts in every run."""
    rng = random.Random(0)
    return [random_text(rng) for _ in range(count)]


def long_texts() -> list[str]:
    """Three of over 10,000 characters: one word, no word, many words."""
    return ["ab" * 5500 + "é" * 500, " \u3000\t" * 4000, " ".join(CAPTIONS * 80)]


def first_difference(ours, reference, batch: list[str]) -> str | None:
    """The first text with other ids than transformers', described; None when all are equal."""
    expected = reference(batch).input_ids
    for text, ids in zip(batch, expected, strict=True):
        if ours.encode(text) != ids:
            return f"{text!r} ({text!a}): {ours.encode(text)} instead of {ids}"
    return None


def miniature_folder(name: str) -> Path:
    """The miniature's `tokenizer` or `tokenizer_2`; skips the test while it is not there."""
    for folder in (REPOSITORY / "data" / "flux-mini" / name, REPOSITORY / "runs" / "tokenizers" / name):
        if folder.is_dir():
            return folder
    pytest.skip(f"the miniature's {name} has not been made yet (data/flux-mini)")


def openai_clip_folder(folder: Path) -> Path:
    """CLIP's real vocabulary as transformers' files, made from the list of merges that open_clip ships."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        missing = "open_clip_torch is not installed: the real CLIP vocabulary cannot be tested (pip install --no-deps open_clip_torch)"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    path = Path(package.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    pieces = (
        symbols
        + [symbol + "</w>" for symbol in symbols]
        + [merge.replace(" ", "") for merge in merges]
        + ["<|startoftext|>", "<|endoftext|>"]
    )
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "special": True}
    tokens = {
        "49406": {"content": "<|startoftext|>", "normalized": True, **flags},
        "49407": {"content": "<|endoftext|>", "normalized": False, **flags},
    }
    config = {"added_tokens_decoder": tokens, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def unigram_folder(folder: Path, pieces: int = 8000) -> Path:
    """A unigram vocabulary like T5's, trained on Python's standard library and on random letters of other scripts."""
    import sentencepiece

    folder.mkdir(parents=True)
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    lines = [line.strip() for path in sources for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    rng = random.Random(0)
    for block in ("latin", "greek", "cyrillic", "hebrew", "arabic", "kana", "combining"):
        letters = characters_of(BLOCKS[block])
        lines += ["".join(rng.choices(letters, k=rng.randint(2, 8))) for _ in range(400)]
    lines = [line for line in lines if 1 < len(line) < 400]
    rng.shuffle(lines)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines[:40000]),
        model_prefix=str(folder / "spiece"),
        vocab_size=pieces,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        num_sub_iterations=1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    config = {
        "extra_ids": 100,
        "model_max_length": 512,
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def every_code_point() -> list[str]:
    """Every assigned code point, inside a word and alone, 50 in a text; private use is left out, being 137,000 of one kind."""
    public = [character for character in assigned() if unicodedata.category(character) != "Co"]
    return [" ".join(f"a{character}b {character}" for character in public[start : start + 50]) for start in range(0, len(public), 50)]
