"""encode_prompt against diffusers' FluxPipeline, with tiny random encoders."""

import dataclasses
import json
import warnings

import pytest
import torch
import transformers
from conftest import randomize_
from diffusers import FluxPipeline

from flux_lab import prompt as prompt_module
from flux_lab.clip import CLIPTextModel
from flux_lab.clip_tokenizer import CLIPTokenizer, bytes_to_unicode
from flux_lab.config import TINY_CLIP, TINY_T5
from flux_lab.prompt import TextEncoders, encode_prompt
from flux_lab.shapes import ShapeError
from flux_lab.t5 import T5EncoderModel
from flux_lab.t5_tokenizer import T5Tokenizer

CLIP_LENGTH, T5_LENGTH = TINY_CLIP.max_position_embeddings, 40


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tokenizers without merges: every byte, and every printable ASCII character, is a piece."""
    clip, t5 = tmp_path_factory.mktemp("tokenizer"), tmp_path_factory.mktemp("tokenizer_2")
    symbols = list(bytes_to_unicode().values())
    pieces = [*symbols, *[symbol + "</w>" for symbol in symbols], "<|startoftext|>", "<|endoftext|>"]
    (clip / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (clip / "merges.txt").write_text("#version: 0.2\n")
    (clip / "tokenizer_config.json").write_text(json.dumps({"model_max_length": CLIP_LENGTH}))
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((chr(code), -3.0) for code in range(33, 127)), ("red", -4.0)]
    transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=T5_LENGTH).save_pretrained(t5)
    return clip, t5


def build(folders, dtype=torch.float32):
    """Our encoders, and a FluxPipeline with transformers' and the same weights."""
    clip, t5 = folders
    text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig.from_dict(TINY_CLIP.to_dict() | {"bos_token_id": None}))
    text_encoder_2 = transformers.T5EncoderModel(transformers.T5Config.from_dict(TINY_T5.to_dict()))
    reference = FluxPipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        text_encoder=randomize_(text_encoder, seed=1).to(dtype),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(clip),
        text_encoder_2=randomize_(text_encoder_2, seed=2).to(dtype),
        tokenizer_2=transformers.T5TokenizerFast.from_pretrained(t5),
    )
    ours = TextEncoders(
        tokenizer=CLIPTokenizer.from_pretrained(clip),
        text_encoder=CLIPTextModel(TINY_CLIP).to(dtype).eval(),
        tokenizer_2=T5Tokenizer.from_pretrained(t5),
        text_encoder_2=T5EncoderModel(TINY_T5).to(dtype).eval(),
    )
    ours.text_encoder.load_state_dict(text_encoder.state_dict())
    ours.text_encoder_2.load_state_dict(text_encoder_2.state_dict())
    return ours, reference


@pytest.fixture(scope="module")
def both(folders):
    return build(folders)


CASES = {
    "one prompt": {"prompt": "a red cube"},
    "prompt_2": {"prompt": "a red cube", "prompt_2": "Two balls"},
    "empty prompt": {"prompt": ""},
    "empty prompt_2 is none": {"prompt": "a cat", "prompt_2": ""},
    "list": {"prompt": ["a red cube", "a dog"]},
    "both lists, three images each": {"prompt": ["red", "blue"], "prompt_2": ["b c", "d"], "num_images_per_prompt": 3},
    "another length": {"prompt": "a red cube", "max_sequence_length": 7},
    "too long for both": {"prompt": ["a large shiny red cube", "a"], "max_sequence_length": 12},
}


def compare(ours, reference, **arguments):
    """The largest difference of the three tensors, infinite when the shapes or dtypes differ."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        got = encode_prompt(ours, **arguments)
        expected = reference.encode_prompt(**{"prompt_2": None, "max_sequence_length": T5_LENGTH, "device": "cpu"} | arguments)
    if [(tensor.shape, tensor.dtype) for tensor in got] != [(tensor.shape, tensor.dtype) for tensor in expected]:
        return float("inf")
    return max((mine - theirs).abs().max().item() for mine, theirs in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_equals_diffusers(both, name):
    assert compare(*both, **CASES[name]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_equals_diffusers_in_half_precision(folders, dtype):
    assert compare(*build(folders, dtype), **CASES["both lists, three images each"]) == 0


def test_copies_of_a_prompt_are_neighbours(both):
    embeds = encode_prompt(both[0], ["red", "blue"], num_images_per_prompt=2)
    assert torch.equal(embeds.prompt_embeds[0], embeds.prompt_embeds[1])
    assert not torch.equal(embeds.prompt_embeds[1], embeds.prompt_embeds[2])


def test_given_embeddings_come_back(both):
    prompt_embeds, pooled = torch.randn(2, 9, 24), torch.randn(2, 20)
    got = encode_prompt(both[0], prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled)
    expected = both[1].encode_prompt(prompt=None, prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled, device="cpu")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected, strict=True))
    copies = encode_prompt(both[0], prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled, num_images_per_prompt=3)
    assert torch.equal(copies.prompt_embeds, prompt_embeds.repeat_interleave(3, dim=0))
    assert torch.equal(copies.pooled_prompt_embeds, pooled.repeat_interleave(3, dim=0))


BUGS = {
    "prompt and prompt_2 swapped": ("_check_prompts", lambda prompt, prompt_2: (["Two balls"], ["a red cube"])),
    "one token short": ("_check_length", lambda length, tokenizer: T5_LENGTH - 1),
}


@pytest.mark.parametrize("bug", BUGS)
def test_parity_fails_on_a_planted_bug(both, monkeypatch, bug):
    monkeypatch.setattr(prompt_module, *BUGS[bug])
    assert compare(*both, **CASES["prompt_2"]) > 1e-3


def test_copies_in_another_order_would_be_seen(both, monkeypatch):
    """The planted bug for the order of the copies: red, blue, red, blue."""
    right = prompt_module.repeat
    monkeypatch.setattr(
        prompt_module,
        "repeat",
        lambda tensor, pattern, **sizes: right(tensor, pattern.replace("(batch images)", "(images batch)"), **sizes),
    )
    assert compare(*both, **CASES["both lists, three images each"]) > 1e-3


def test_warns_of_lost_words(both):
    with pytest.warns(UserWarning, match="lost") as caught:
        encode_prompt(both[0], "a large red cube", prompt_2="a large red cube on sand", max_sequence_length=16)
    messages = [str(warning.message) for warning in caught]
    assert messages == ["prompt_2: T5EncoderModel reads 16 tokens, this prompt has 24; lost: 'on sand'"]
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="lost") as caught:
        encode_prompt(both[0], "seventeen letters", max_sequence_length=6)
    messages = [str(warning.message) for warning in caught]
    assert messages == [
        "prompt: CLIPTextModel reads 16 tokens, this prompt has 18; lost: 'rs'",
        "prompt: T5EncoderModel reads 6 tokens, this prompt has 19; lost: 'nteen letters'",
    ]


def test_does_not_warn_when_everything_fits(both):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_prompt(both[0], "fourteen chars", max_sequence_length=17)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "prompt: expected a string or a list of strings, got NoneType"),
        ({"prompt": 5}, TypeError, "prompt: expected a string or a list of strings, got int"),
        ({"prompt": ["a", 5]}, TypeError, r"prompt\[1\]: expected a string, got int"),
        ({"prompt": []}, ValueError, "prompt: expected at least one string, got an empty list"),
        ({"prompt": "a", "prompt_2": 5}, TypeError, "prompt_2: expected a string or a list of strings, got int"),
        ({"prompt": ["a", "b"], "prompt_2": ["a"]}, ValueError, "prompt_2: expected as many prompts as in prompt, 2, got 1"),
        ({"prompt": "a", "max_sequence_length": 513}, ValueError, "max_sequence_length: expected 2 to 512, got 513"),
        ({"prompt": "a", "max_sequence_length": 0}, ValueError, "max_sequence_length: expected 2 to 512, got 0"),
        ({"prompt": "a", "max_sequence_length": 7.5}, TypeError, "max_sequence_length: expected an integer, got float"),
        ({"prompt": "a", "num_images_per_prompt": 0}, ValueError, "num_images_per_prompt: expected at least 1, got 0"),
        ({"prompt": "a", "num_images_per_prompt": "2"}, TypeError, "num_images_per_prompt: expected an integer, got str"),
        ({"prompt_embeds": torch.zeros(1, 2, 24)}, ValueError, "pooled_prompt_embeds: expected a tensor, got None"),
        ({"pooled_prompt_embeds": torch.zeros(1, 20)}, ValueError, "prompt_embeds: expected a tensor, got None"),
        (
            {"prompt": "a", "prompt_embeds": torch.zeros(1, 2, 24), "pooled_prompt_embeds": torch.zeros(1, 20)},
            ValueError,
            "prompt: expected None beside prompt_embeds, got 'a'",
        ),
        (
            {"prompt_embeds": torch.zeros(1, 2, 24), "pooled_prompt_embeds": torch.zeros(3, 20)},
            ShapeError,
            r"encode_prompt: argument `pooled_prompt_embeds`: expected float \[batch=1 pooled_dim\], got float32 \[3, 20\]",
        ),
    ],
)
def test_wrong_arguments(both, arguments, error, message):
    with pytest.raises(error, match=message):
        encode_prompt(both[0], **arguments)


def test_tokenizer_and_encoder_that_do_not_belong_together(both):
    small = CLIPTextModel(dataclasses.replace(TINY_CLIP, vocab_size=300)).eval()
    with pytest.raises(ValueError, match="CLIPTokenizer gives id 513, CLIPTextModel has vocab_size=300: not a pair"):
        encode_prompt(dataclasses.replace(both[0], text_encoder=small), "a")
