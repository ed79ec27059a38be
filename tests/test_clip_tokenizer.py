"""CLIP's tokenizer against transformers', with the real vocabulary and the miniature's."""

import json
import shutil
import unicodedata

import pytest
import tokenizer_texts
import torch
import transformers

from flux_lab import clip_tokenizer
from flux_lab.clip_tokenizer import CLIPTokenizer, clean_text, merge_symbols, split_words

VOCABULARIES = ["OpenAI, vocab.json", "OpenAI, tokenizer.json", "miniature"]


@pytest.fixture(scope="session")
def openai_folder(tmp_path_factory):
    return tokenizer_texts.openai_clip_folder(tmp_path_factory.mktemp("clip") / "vocab_json")


@pytest.fixture(scope="session")
def pair(openai_folder, tmp_path_factory):
    """name -> our tokenizer and transformers', each made once."""
    made = {}

    def make(name):
        if name not in made:
            folder = tokenizer_texts.miniature_folder("tokenizer") if name == "miniature" else openai_folder
            reference = transformers.CLIPTokenizer.from_pretrained(folder)
            if name == "OpenAI, tokenizer.json":
                folder = tmp_path_factory.mktemp("clip") / "tokenizer_json"
                reference.save_pretrained(folder)
                assert not (folder / "vocab.json").exists()
            made[name] = CLIPTokenizer.from_pretrained(folder), reference
        return made[name]

    return make


@pytest.fixture(scope="session")
def openai(pair):
    return pair("OpenAI, vocab.json")


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
def test_ids_of_every_assigned_code_point(openai):
    assert tokenizer_texts.first_difference(*openai, tokenizer_texts.every_code_point()) is None


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_of_long_texts(pair, name):
    assert all(len(text) > 10_000 for text in tokenizer_texts.long_texts())
    assert tokenizer_texts.first_difference(*pair(name), tokenizer_texts.long_texts()) is None


def test_one_long_word_is_not_quadratic(openai, monkeypatch):
    """Each merge may look at two pairs, whatever the length of the word."""
    looked_up = []

    class Ranks(dict):
        def get(self, key, default=None):
            looked_up.append(key)
            return super().get(key, default)

    symbols = clip_tokenizer.spell("ab" * 5000)
    _, merges = merge_symbols(symbols, Ranks(openai[0].ranks))
    assert len(looked_up) <= len(symbols) + 2 * len(merges)


@pytest.mark.parametrize("max_length", [2, 3, 5, 8, 77, 200])
@pytest.mark.parametrize("name", VOCABULARIES)
def test_padding_and_truncation(pair, name, max_length):
    ours, reference = pair(name)
    texts = ["", *tokenizer_texts.CAPTIONS, "a red cube <|endoftext|> and more", " ".join(["sphere"] * 90)]
    expected = reference(texts, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt").input_ids
    got = ours(texts, max_length=max_length)
    assert got.dtype == torch.int64
    assert torch.equal(got, expected)


def test_the_folder_gives_the_default_length(pair):
    ours, reference = pair("miniature")
    assert ours.model_max_length == reference.model_max_length == 77
    assert ours("a red cube").shape == (1, 77)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_decode(pair, name):
    ours, reference = pair(name)
    for text in [*tokenizer_texts.many_texts(500)[::5], *tokenizer_texts.CAPTIONS]:
        ids = ours.encode(text)
        assert ours.decode(ids) == reference.decode(ids)
        assert ours.decode(ids[1:-1][:3]) == reference.decode(ids[1:-1][:3])  # may end inside a character
    assert ours.decode(torch.tensor(ours.encode("a red cube"))[1:-1]) == "a red cube"


CONFIGS = {
    "none": {},
    "pad with !": {"pad_token": "!"},
    "token takes the space beside it": {
        "added_tokens_decoder": {
            "49407": {
                "content": "<|endoftext|>",
                "lstrip": True,
                "rstrip": True,
                "normalized": False,
                "single_word": False,
                "special": True,
            },
        }
    },
    "named by dicts": {
        "bos_token": {"__type": "AddedToken", "content": "<|startoftext|>", "lstrip": False, "normalized": True, "rstrip": True}
    },
    "another unknown token": {"unk_token": "!", "model_max_length": 1_000_000_000_000},
}


@pytest.mark.parametrize(
    ("name", "as_map"), [(name, False) for name in CONFIGS] + [(name, True) for name in ("none", "pad with !", "named by dicts")]
)
def test_special_tokens_as_the_configuration_says(openai_folder, tmp_path, name, as_map):
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(openai_folder / file, tmp_path)
    path = tmp_path / ("special_tokens_map.json" if as_map else "tokenizer_config.json")
    path.write_text(json.dumps(CONFIGS[name]) if not as_map else json.dumps(CONFIGS[name]).replace('"__type": "AddedToken", ', ""))
    ours, reference = CLIPTokenizer.from_pretrained(tmp_path), transformers.CLIPTokenizer.from_pretrained(tmp_path)
    texts = tokenizer_texts.many_texts(500)[::5]
    texts += ["Hi ! there!", "one  <|endoftext|> \n two <|startoftext|> <|endoftext|><|ENDOFTEXT|>three"]
    assert tokenizer_texts.first_difference(ours, reference, texts) is None
    assert ours.pad_token_id == reference.pad_token_id
    assert ours.model_max_length == 77


def test_a_byte_that_the_vocabulary_lacks_is_unknown(tmp_path):
    vocab = ["!", "a", "b", "a</w>", "b</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(vocab)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    ours, reference = CLIPTokenizer.from_pretrained(tmp_path), transformers.CLIPTokenizer.from_pretrained(tmp_path)
    for text in ("ab", "aab xyz b", "éab"):
        assert ours.encode(text) == reference(text).input_ids


BUGS = {
    "lower-cases the whole text at once": ("clean_text", lambda text: clean_text(text.lower())),
    "no Unicode normalisation": ("clean_text", lambda text: " ".join("".join(map(str.lower, text)).split())),
    "splits at white space only": ("split_words", lambda text: text.split()),
    "a number is one word": (
        "_kind",
        lambda character: "letter" if character.isdigit() else clip_tokenizer.__dict__["_true_kind"](character),
    ),
    "no end of word": ("spell", lambda word: [clip_tokenizer.bytes_to_unicode()[byte] for byte in word.encode()]),
    "merges from the left": ("merge_symbols", lambda symbols, ranks: merge_symbols(symbols, dict.fromkeys(ranks, 0))),
}


@pytest.mark.parametrize("bug", BUGS)
def test_parity_fails_on_a_planted_bug(openai, monkeypatch, bug):
    name, wrong = BUGS[bug]
    monkeypatch.setattr(clip_tokenizer, "_true_kind", clip_tokenizer._kind, raising=False)
    monkeypatch.setattr(clip_tokenizer, name, wrong)
    assert tokenizer_texts.first_difference(*openai, tokenizer_texts.many_texts(500)) is not None


def test_explain_shows_every_step(openai):
    ours, _ = openai
    steps = ours.explain("A  Café’s CUBES <|endoftext|>!")
    assert steps.cleaned == "a café’s cubes <|endoftext|>!"
    assert [word.text for word in steps.words] == ["a", "café", "’", "s", "cubes", "<|endoftext|>", "!"]
    cafe, cubes, special = steps.words[1], steps.words[4], steps.words[5]
    assert cafe.symbols == ("c", "a", "f", "Ã", "©</w>")
    stages = list(cafe.stages())
    assert stages[0] == cafe.symbols
    assert stages[-1] == cafe.pieces
    assert [len(stage) for stage in stages] == list(range(5, 5 - len(stages), -1))
    assert special.merges == ()
    assert special.ids == (49407,)
    assert all(ours.ranks[merge.left, merge.right] == merge.rank for merge in cubes.merges)
    assert steps.ids == tuple(ours.encode("A  Café’s CUBES <|endoftext|>!"))
    assert len(steps.pieces) == len(steps.ids)
    assert steps.pieces[0] == "<|startoftext|>"


def test_stages_end_in_the_pieces(openai):
    for text in tokenizer_texts.many_texts(500)[::10]:
        for word in openai[0].explain(text).words:
            assert list(word.stages())[-1] == word.pieces


def test_merges_take_the_lowest_rank_and_of_equals_the_leftmost():
    ranks = {("b", "c"): 0, ("a", "b"): 1, ("a", "bc"): 2}
    assert merge_symbols("abcab", ranks)[0] == ["abc", "ab"]
    assert merge_symbols("aaa", {("a", "a"): 0})[0] == ["aa", "a"]
    assert merge_symbols(["x"], ranks) == (["x"], [])


def test_words():
    assert split_words("it's 2024 don'try!'s") == ["it", "'s", "2", "0", "2", "4", "don", "'t", "ry", "!'", "s"]
    assert split_words("<|endoftext|>!!<") == ["<|", "endoftext", "|>", "!!<"]
    assert split_words(" \x1c ") == ["\x1c"]


def test_cleaning():
    assert clean_text("ΣΑΣ") == "σασ"
    assert clean_text("e\u0301\u3000\n x\x1fy") == "é x\x1fy"


def test_combining_marks_younger_than_the_reference(openai):
    """U+0EBA came with Unicode 12; Python's NFC would sort it after U+0335."""
    text = "a\u0eba\u0335"
    assert unicodedata.normalize("NFC", text) != text
    assert tokenizer_texts.first_difference(*openai, [text, "\u0e38\u0eba", "\U00011935\U00011930"]) is None


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (5, TypeError, "text: expected a string or a list of strings, got int"),
        (None, TypeError, "text: expected a string or a list of strings, got NoneType"),
        (["a", b"b"], TypeError, r"text\[1\]: expected a string, got bytes"),
        ([], ValueError, "text: expected at least one string, got an empty list"),
        ("a \ud800", ValueError, r"text: expected valid Unicode, got the lone surrogate U\+D800 at character 2"),
    ],
)
def test_wrong_text(openai, text, error, message):
    with pytest.raises(error, match=message):
        openai[0](text)


def test_wrong_arguments(openai):
    with pytest.raises(ValueError, match="max_length: expected an integer of at least 2, got 1"):
        openai[0]("a", max_length=1)
    with pytest.raises(ValueError, match="ids: 49408 is not in the vocabulary, expected 0 to 49407"):
        openai[0].decode([320, 49408])
    with pytest.raises(TypeError, match="text: expected a string, got list"):
        openai[0].explain(["a"])


VOCAB = '{"a": 0, "b</w>": 1, "ab</w>": 2, "<|startoftext|>": 3, "<|endoftext|>": 4}'


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({}, FileNotFoundError, "vocab.json is missing"),
        ({"vocab.json": VOCAB}, FileNotFoundError, "merges.txt is missing"),
        ({"vocab.json": "{", "merges.txt": ""}, ValueError, "vocab.json: not a json file"),
        ({"vocab.json": "[]", "merges.txt": ""}, ValueError, "vocab.json: expected a dict of piece -> id, got list"),
        ({"vocab.json": '{"a": "1"}', "merges.txt": ""}, ValueError, "vocab.json: id of 'a': expected an integer of at least 0, got '1'"),
        ({"vocab.json": '{"a": 1, "b": 1}', "merges.txt": ""}, ValueError, "expected one id for each piece, got 2 pieces with 1 ids"),
        ({"vocab.json": '{"a": 0}', "merges.txt": ""}, ValueError, r"bos_token '<\|startoftext\|>' is not in the vocabulary"),
        ({"vocab.json": VOCAB, "merges.txt": "a b</w> c"}, ValueError, "merges.txt: merge 0: expected two symbols, got"),
        ({"vocab.json": VOCAB, "merges.txt": "a b"}, ValueError, "merges.txt: merge 0, .*: 'b' is not in the vocabulary"),
        ({"tokenizer.json": '{"model": {"type": "Unigram"}}'}, ValueError, "tokenizer.json: model type 'Unigram', expected 'BPE'"),
        ({"tokenizer_config.json": '{"padding_side": "left"}'}, ValueError, "padding_side='left' is not supported, expected 'right'"),
        ({"tokenizer_config.json": "[]"}, ValueError, "tokenizer_config.json: expected a json object, got list"),
    ],
)
def test_bad_files(tmp_path, files, error, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        CLIPTokenizer.from_pretrained(tmp_path)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer folder .*nowhere does not exist"):
        CLIPTokenizer.from_pretrained(tmp_path / "nowhere")
