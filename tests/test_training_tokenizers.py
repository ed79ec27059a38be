"""The trained vocabularies: CLIP's and T5's layouts, read by transformers, long enough for every caption, the same each time."""

import json
import string

import numpy as np
import pytest
import sentencepiece
from transformers import CLIPTokenizer, T5TokenizerFast

from flux_lab.training import captions, tokenizers, world

RNG = np.random.default_rng(11)
TEXTS = [caption.text for _ in range(900) for caption in captions.captions(world.sample_scene(RNG), RNG, 6)]
UNKNOWN = ["A Zebra, 42 pink-elephants!", string.printable, "naïve café", "GIANT unicorns; [x] {y} ~ ^"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizers")
    words = tokenizers.EVERYDAY.split() * tokenizers.EVERYDAY_WEIGHT
    assert tokenizers.write_tokenizers(out, TEXTS + words) == {"tokenizer": 1000, "tokenizer_2": 512}
    return out


@pytest.fixture(scope="module")
def clip(folder) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder / "tokenizer")


@pytest.fixture(scope="module")
def t5(folder) -> T5TokenizerFast:
    return T5TokenizerFast.from_pretrained(folder / "tokenizer_2")


def test_clip_vocabulary_has_the_layout_of_the_original(folder, clip):
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    tokens = list(vocabulary)
    assert list(vocabulary.values()) == list(range(1000))
    assert tokens[:3] == ["!", '"', "#"]
    assert len(set("".join(tokens[:256]))) == 256
    assert tokens[256:512] == [symbol + "</w>" for symbol in tokens[:256]]
    merges = (folder / "tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert merges[0] == "#version: 0.2"
    assert tokens[512:-2] == ["".join(line.split(" ")) for line in merges[1:]]
    assert tokens[-2:] == [clip.bos_token, clip.eos_token] == ["<|startoftext|>", "<|endoftext|>"]
    assert clip.eos_token_id == clip.pad_token_id == 999
    assert clip.model_max_length == 77


def test_clip_byte_symbols_are_those_of_the_byte_level_alphabet():
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(tokenizers.byte_symbols()) == sorted(ByteLevel.alphabet())


def test_t5_vocabulary_has_the_layout_of_the_original(t5):
    tokens = t5.convert_ids_to_tokens(list(range(len(t5))))
    assert tokens[:3] == ["<pad>", "</s>", "<unk>"]
    assert tokens[500:] == [f"<extra_id_{index}>" for index in reversed(range(12))]
    assert (t5.pad_token_id, t5.eos_token_id, t5.unk_token_id) == (0, 1, 2)
    assert t5.model_max_length == 32
    assert t5("a red cube <extra_id_0>").input_ids[-2:] == [511, 1]


def test_every_caption_fits(clip, t5):
    assert max(map(len, clip(TEXTS).input_ids)) <= 77
    assert max(map(len, t5(TEXTS).input_ids)) <= 32


@pytest.mark.parametrize(
    "word", [*world.SHAPES, *world.COLORS, *world.SIZES, *world.MATERIALS, "floor", "left", "right", "front", "behind"]
)
def test_the_words_of_the_world_are_one_token_each(word, clip, t5):
    assert clip.tokenize(word) == [word + "</w>"]
    assert t5.tokenize(word) == ["▁" + word]


@pytest.mark.parametrize("text", UNKNOWN)
def test_unknown_words_fall_into_pieces(text, clip, t5):
    assert clip.decode(clip(text).input_ids, skip_special_tokens=True).replace(" ", "") == "".join(text.lower().split())
    if text.isascii():
        assert t5.unk_token_id not in t5(text).input_ids


def test_both_t5_files_hold_the_same_model(folder, t5):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer_2" / "spiece.model"))
    for text in TEXTS[:400] + UNKNOWN[:1]:
        assert reference.encode(text) == t5(text).input_ids[:-1]
    assert b"seeds" not in (folder / "tokenizer_2" / "spiece.model").read_bytes()


def test_training_again_gives_the_same_bytes(folder, tmp_path):
    tokenizers.write_tokenizers(tmp_path, TEXTS + tokenizers.EVERYDAY.split() * tokenizers.EVERYDAY_WEIGHT)
    names = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(names) == 8
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_merges_by_hand():
    words = ["abab abab abc"]
    assert tokenizers.train_merges(words, 9) == [("a", "b"), ("a", "b</w>"), ("ab", "ab</w>"), ("ab", "c</w>")]
    assert tokenizers.train_merges(words, 2) == [("a", "b"), ("a", "b</w>")]
    assert tokenizers.merge(("a", "b", "a", "b", "c"), ("a", "b")) == ("ab", "ab", "c")
    assert tokenizers.merge(("a", "a", "a"), ("a", "a")) == ("aa", "a")


@pytest.mark.parametrize("word", ["cylinder", "turquoise", "elephant", "unicorns"])
def test_transformers_splits_words_as_the_merges_in_turn_do(word, folder, clip):
    symbols = (*word[:-1], word[-1] + "</w>")
    for line in (folder / "tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]:
        symbols = tokenizers.merge(symbols, tuple(line.split(" ")))
    assert clip.tokenize(word) == list(symbols)


def test_the_command_reads_scenes_and_writes_a_log(tmp_path, capsys):
    from flux_lab.training import scenes

    scenes.write_scenes(tmp_path / "scenes", scenes.Settings(count=60, size=16))
    tokenizers.main(["--scenes", str(tmp_path / "scenes"), "--out", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "log.json").read_text())["vocabulary"] == {"tokenizer": 1000, "tokenizer_2": 512}
    assert "CLIP vocabulary 1000" in capsys.readouterr().out
