"""flux_lab.tokenizer: what both tokenizers share. Their equality with transformers is shown in the tests of each."""

import json

import pytest
import torch

from flux_lab.tokenizer import SpecialToken, SpecialTokens, Tokenizer, check_texts, max_length_of, read_config, read_special_tokens


class Letters(Tokenizer):
    """A token for each letter, then the end."""

    def __init__(self):
        special = [SpecialToken("<end>", 3), SpecialToken("<pad>", 4)]
        super().__init__({"a": 0, "b": 1, "c": 2}, special, {"eos_token": "<end>", "pad_token": "<pad>"}, model_max_length=6)

    def clean(self, text):
        return text.lower()

    def encode(self, text):
        ids = []
        for part in self.special_tokens.split(text):
            ids += [part.id] if isinstance(part, SpecialToken) else [self.vocab[letter] for letter in part]
        return [*ids, self.eos_token_id]


def test_padding_truncation_and_special_tokens():
    ids = Letters()(["aB", "abcabc", "a<pad>c", ""], max_length=5)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[0, 1, 3, 4, 4], [0, 1, 2, 0, 3], [0, 4, 2, 3, 4], [3, 4, 4, 4, 4]]
    assert Letters()("a").shape == (1, 6)


def test_special_tokens_take_the_white_space_they_ask_for():
    tokens = SpecialTokens([SpecialToken("<x>", 1, lstrip=True), SpecialToken("<xy>", 2, rstrip=True)], str.upper)
    parts = [part if isinstance(part, str) else part.id for part in tokens.split("a <x> b<xy> \t c")]
    assert parts == ["A", 1, " B", 2, "C"]


def test_a_normalized_token_is_found_in_the_cleaned_text():
    tokens = SpecialTokens([SpecialToken("Stop", 1, normalized=True)], str.lower)
    assert [part if isinstance(part, str) else part.id for part in tokens.split("go STOP")] == ["go ", 1]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (3, TypeError, "text: expected a string or a list of strings, got int"),
        ([], ValueError, "text: expected at least one string, got an empty list"),
        (["a", None], TypeError, r"text\[1\]: expected a string, got NoneType"),
        ("a\ud800", ValueError, r"text: expected valid Unicode, got the lone surrogate U\+D800 at character 1"),
    ],
)
def test_wrong_texts(text, error, message):
    with pytest.raises(error, match=message):
        check_texts(text)


def test_wrong_lengths_and_ids():
    with pytest.raises(ValueError, match="max_length: expected an integer of at least 2, got 1"):
        Letters()("a", max_length=1)
    with pytest.raises(ValueError, match="ids: 9 is not in the vocabulary, expected 0 to 4"):
        Letters().pieces_of([0, 9])


def test_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer folder .* does not exist"):
        read_config(tmp_path / "nowhere")
    assert read_config(tmp_path) == {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"padding_side": "left"}))
    with pytest.raises(ValueError, match="padding_side='left' is not supported"):
        read_config(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not a json file"):
        read_config(tmp_path)


def test_settings():
    assert max_length_of({"model_max_length": 32}, 512) == 32
    assert max_length_of({"model_max_length": 10**30}, 512) == 512
    with pytest.raises(ValueError, match="single_word=True is not supported"):
        read_special_tokens(None, {"added_tokens_decoder": {"7": {"content": "<a>", "single_word": True}}}, [], {})
