"""T5's tokenizer against transformers', with an 8,000-piece vocabulary made here and the miniature's."""

import json
import math
import shutil

import pytest
import tokenizer_texts
import torch
import transformers
from transformers.convert_slow_tokenizer import SentencePieceExtractor

from flux_lab import t5_tokenizer
from flux_lab.sentencepiece_model import read_sentencepiece_model
from flux_lab.t5_tokenizer import Candidate, T5Tokenizer, best_path, split_words

VOCABULARIES = ["8,000 pieces, spiece.model", "8,000 pieces, tokenizer.json", "miniature"]


@pytest.fixture(scope="session")
def spiece_folder(tmp_path_factory):
    return tokenizer_texts.unigram_folder(tmp_path_factory.mktemp("t5") / "spiece", pieces=8000)


@pytest.fixture(scope="session")
def pair(spiece_folder, tmp_path_factory):
    """name -> our tokenizer and the one that diffusers' FluxPipeline loads, each made once."""
    made = {}

    def make(name):
        if name not in made:
            folder = tokenizer_texts.miniature_folder("tokenizer_2") if name == "miniature" else spiece_folder
            reference = transformers.T5TokenizerFast.from_pretrained(folder)
            if name == "8,000 pieces, tokenizer.json":
                folder = tmp_path_factory.mktemp("t5") / "tokenizer_json"
                reference.save_pretrained(folder)
                assert not (folder / "spiece.model").exists()
            made[name] = T5Tokenizer.from_pretrained(folder), reference
        return made[name]

    return make


@pytest.fixture(scope="session")
def trained(pair):
    return pair("8,000 pieces, spiece.model")


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_of_500_texts(pair, name):
    assert tokenizer_texts.first_difference(*pair(name), tokenizer_texts.many_texts(500)) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_of_20000_texts(pair, name):
    texts = tokenizer_texts.many_texts(20_000)
    assert len(texts) == 20_000
    assert tokenizer_texts.first_difference(*pair(name), texts) is None


@pytest.mark.slow
def test_ids_of_every_assigned_code_point(trained):
    assert tokenizer_texts.first_difference(*trained, tokenizer_texts.every_code_point()) is None


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_of_long_texts(pair, name):
    assert all(len(text) > 10_000 for text in tokenizer_texts.long_texts())
    assert tokenizer_texts.first_difference(*pair(name), tokenizer_texts.long_texts()) is None


def test_one_long_word_is_not_quadratic(trained):
    """The lattice grows with the length of the word times that of the longest piece, whatever the word."""
    word = "▁" + "ab" * 5000
    assert len(list(trained[0].lattice(word))) < 5 * len(word)


@pytest.mark.parametrize("max_length", [2, 3, 5, 32, 256, 512])
@pytest.mark.parametrize("name", VOCABULARIES)
def test_padding_and_truncation(pair, name, max_length):
    ours, reference = pair(name)
    texts = ["", *tokenizer_texts.CAPTIONS, "a red cube </s> and more", " ".join(["sphere"] * 600)]
    expected = reference(texts, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt").input_ids
    got = ours(texts, max_length=max_length)
    assert got.dtype == torch.int64
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_folder_gives_the_default_length(pair, name):
    ours, reference = pair(name)
    assert ours.model_max_length == reference.model_max_length
    assert ours("a red cube").shape == (1, ours.model_max_length)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_decode(pair, name):
    ours, reference = pair(name)
    for text in [*tokenizer_texts.many_texts(500)[::5], *tokenizer_texts.CAPTIONS]:
        ids = ours.encode(text)
        assert ours.decode(ids) == reference.decode(ids, clean_up_tokenization_spaces=False)
    assert ours.decode(torch.tensor(ours.encode("a red cube"))[:-1]) == "a red cube"


def added(content, **flags):
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True} | flags


# As google/t5-v1_1-xxl has them: the sentinels take the white space on both sides.
CONFIGS = {
    "none": {},
    "sentinels take the spaces": {
        "added_tokens_decoder": {
            **{str(index): added(token) for index, token in enumerate(["<pad>", "</s>", "<unk>"])},
            **{str(8099 - index): added(f"<extra_id_{index}>", lstrip=True, rstrip=True) for index in range(100)},
        },
        "additional_special_tokens": [f"<extra_id_{index}>" for index in range(100)],
        "extra_ids": 100,
    },
    "no sentinels": {"extra_special_tokens": [], "extra_ids": 0},
    "found after cleaning": {"added_tokens_decoder": {"1": added("</s>", normalized=True)}},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_special_tokens_as_the_configuration_says(spiece_folder, tmp_path, name):
    shutil.copy(spiece_folder / "spiece.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIGS[name]))
    ours, reference = T5Tokenizer.from_pretrained(tmp_path), transformers.T5TokenizerFast.from_pretrained(tmp_path)
    texts = [*tokenizer_texts.many_texts(500)[::5], "a <extra_id_0> \u3000b", "<extra_id_5><extra_id_99>  </s> x", " <extra_id_1> "]
    assert tokenizer_texts.first_difference(ours, reference, texts) is None
    assert ours.model_max_length == 512


def greedy(candidates, length):
    """The longest piece from the left instead of the best path."""
    path, place = [], 0
    while place < length:
        path.append(max((candidate for candidate in candidates if candidate.start == place), key=lambda candidate: candidate.end))
        place = path[-1].end
    return path


BUGS = {
    "longest piece first": ("best_path", greedy),
    "no metaspace": ("split_words", lambda text: text.split()),
    "unknown pieces not fused": ("Word.fused", lambda self: [(candidate.piece, candidate.id) for candidate in self.path]),
    "no character map": ("T5Tokenizer.clean", lambda self, text: text),
}


@pytest.mark.parametrize("bug", BUGS)
def test_parity_fails_on_a_planted_bug(spiece_folder, trained, monkeypatch, bug):
    name, wrong = BUGS[bug]
    owner, _, attribute = name.rpartition(".")
    monkeypatch.setattr(getattr(t5_tokenizer, owner) if owner else t5_tokenizer, attribute, wrong)
    ours = T5Tokenizer.from_pretrained(spiece_folder)
    assert tokenizer_texts.first_difference(ours, trained[1], tokenizer_texts.many_texts(500)) is not None


def test_explain_shows_every_step(trained):
    ours, _ = trained
    steps = ours.explain("Ｔhe  return ☃☃ </s>x")
    assert steps.normalized == "The  return ☃☃ </s>x"
    assert [word.text for word in steps.words] == ["▁The", "▁return", "▁☃☃", "</s>", "▁x"]
    word = steps.words[1]
    assert {candidate.piece for candidate in word.path} <= {candidate.piece for candidate in word.lattice}
    assert all(word.text[candidate.start : candidate.end] == candidate.piece for candidate in word.lattice)
    assert [candidate.end for candidate in word.path[:-1]] == [candidate.start for candidate in word.path[1:]]
    unknown = [candidate for candidate in steps.words[2].lattice if candidate.id == 2]
    assert [candidate.piece for candidate in unknown] == ["☃", "☃"]
    assert unknown[0].score == ours.unknown_score
    assert ("☃☃", 2) in steps.words[2].fused()
    assert steps.words[3].fused() == [("</s>", 1)]
    assert steps.ids == tuple(ours.encode("Ｔhe  return ☃☃ </s>x"))
    assert len(steps.pieces) == len(steps.ids)
    assert steps.pieces[-1] == "</s>"


def test_best_path_is_the_best_of_all(trained):
    """Against every path through the lattice, for words short enough to list them."""

    def paths(candidates, place, length):
        if place == length:
            yield ()
        for candidate in candidates:
            if candidate.start == place:
                yield from ((candidate, *rest) for rest in paths(candidates, candidate.end, length))

    for text in ("import", "selfself", "xqz☃"):
        word = trained[0].explain(text).words[0]
        best = max(sum(candidate.score for candidate in path) for path in paths(word.lattice, 0, len(word.text)))
        assert math.isclose(word.score, best, rel_tol=1e-12)


def test_penalty_of_an_unknown_character(tmp_path):
    """Two pieces, -9 each, against an unknown character, -9 - 10, and a piece of -0.5: with a smaller penalty the other path would win."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -9.0), ("bc", -9.0), ("abc", -0.5)]
    transformers.T5Tokenizer(vocab=vocab, extra_ids=0).save_pretrained(tmp_path)
    ours, reference = T5Tokenizer.from_pretrained(tmp_path), transformers.T5TokenizerFast.from_pretrained(tmp_path)
    assert ours.unknown_score == -19.0
    assert ours.encode("abc") == reference("abc").input_ids == [3, 4, 1]


def test_of_equal_paths_the_one_with_the_longer_last_piece():
    pieces = [Candidate(0, 1, "a", 3, -1.0), Candidate(0, 2, "ab", 4, -2.0), Candidate(1, 2, "b", 5, -1.0)]
    assert [candidate.piece for candidate in best_path(pieces, 2)] == ["ab"]


def test_words():
    assert split_words("  a b\u3000▁c d▁▁e\x1cf ") == ["▁a", "▁b", "▁c", "▁d", "▁", "▁e\x1cf"]
    assert split_words(" \n") == []


def test_sentencepiece_file_as_its_own_library_reads_it(spiece_folder):
    proto = SentencePieceExtractor(str(spiece_folder / "spiece.model")).proto
    ours = read_sentencepiece_model(spiece_folder / "spiece.model")
    assert [tuple(piece) for piece in ours.pieces] == [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    assert ours.charsmap == proto.normalizer_spec.precompiled_charsmap


def test_wrong_arguments(trained):
    with pytest.raises(TypeError, match="text: expected a string or a list of strings, got int"):
        trained[0](5)
    with pytest.raises(TypeError, match=r"text\[0\]: expected a string, got NoneType"):
        trained[0]([None])
    with pytest.raises(ValueError, match="max_length: expected an integer of at least 2, got 0"):
        trained[0]("a", max_length=0)
    with pytest.raises(ValueError, match="ids: -1 is not in the vocabulary, expected 0 to 8099"):
        trained[0].decode([-1])


FIRST = '["<pad>", 0], ["</s>", 0], ["<unk>", 0]'
CHARSMAP = '{"type": "Precompiled", "precompiled_charsmap": "%"}'


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({}, FileNotFoundError, "spiece.model is missing"),
        ({"spiece.model": "not a model"}, ValueError, "spiece.model: not a sentencepiece model"),
        ({"spiece.model": ""}, ValueError, "spiece.model: expected a unigram model, got model type 1 with 0 pieces"),
        ({"tokenizer.json": "{"}, ValueError, "tokenizer.json: not a json file"),
        ({"tokenizer.json": '{"model": {"type": "BPE"}}'}, ValueError, "tokenizer.json: model type 'BPE', expected 'Unigram'"),
        (
            {"tokenizer.json": '{"model": {"type": "Unigram", "vocab": [1]}}'},
            ValueError,
            r"expected model.vocab to be a list of \[piece, score\]",
        ),
        (
            {"tokenizer.json": '{"model": {"type": "Unigram", "vocab": [["a", -1.0]]}}'},
            ValueError,
            r"expected the first pieces to be .*got \['a'\]",
        ),
        (
            {"tokenizer.json": f'{{"model": {{"type": "Unigram", "vocab": [{FIRST}]}}, "normalizer": {CHARSMAP}}}'},
            ValueError,
            "tokenizer.json: precompiled_charsmap is not base64",
        ),
    ],
)
def test_bad_files(tmp_path, files, error, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        T5Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.999])
def test_truncated_sentencepiece_file(spiece_folder, tmp_path, kept):
    data = (spiece_folder / "spiece.model").read_bytes()
    (tmp_path / "spiece.model").write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=r"spiece.model: not a sentencepiece model"):
        T5Tokenizer.from_pretrained(tmp_path)
