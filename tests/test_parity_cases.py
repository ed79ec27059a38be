"""The cases of parity compare what they claim to: a bug planted in ours breaks the bound of the row."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flux_lab import attention, autoencoder, blocks, clip, embeddings, image_processor, normalization, scheduler, t5, transformer
from flux_lab.instruments import parity_cases
from flux_lab.instruments.parity import bundled, measure
from flux_lab.instruments.parity_cases import cases, same_picture, texts


def after(change: Callable[[Any], Any]) -> Callable[[Callable], Callable]:
    """A bug: what the function gives, changed."""
    return lambda function: lambda *args, **kwargs: change(function(*args, **kwargs))


def before(change: Callable[..., tuple]) -> Callable[[Callable], Callable]:
    """A bug: the positional arguments, changed."""
    return lambda function: lambda *args, **kwargs: function(*change(*args), **kwargs)


SWAPPED = before(lambda x, shift, scale: (x, scale, shift))
BUGS = {
    "CLIP text encoder": (clip, "quick_gelu", lambda _: torch.nn.functional.gelu),
    "T5 encoder": (t5, "gelu_new", lambda _: torch.nn.functional.relu),
    "pack, unpack, ids": (parity_cases, "prepare_latent_image_ids", after(lambda ids: ids.flip(-1))),
    "sigmas and steps": (scheduler.FlowMatchEulerDiscreteScheduler, "time_shift", after(lambda sigmas: sigmas * 0.999)),
    "conditioning": (embeddings, "get_timestep_embedding", after(lambda waves: waves.roll(waves.shape[-1] // 2, dims=-1))),
    "RoPE": (parity_cases, "apply_rotary_emb", before(lambda x, rotation: (x, (rotation[0], -rotation[1])))),
    "adaptive norm, double": (normalization, "modulate", SWAPPED),
    "adaptive norm, single": (normalization, "modulate", SWAPPED),
    "adaptive norm, last": (normalization, "modulate", SWAPPED),
    "joint attention": (attention.Attend, "forward", before(lambda self, query, key, value: (self, key, query, value))),
    "double-stream block": (blocks, "modulate", SWAPPED),
    "single-stream block": (blocks, "_clip_float16", after(lambda x: x * 1.01)),
    "transformer, 57 blocks": (transformer, "TIME_SCALE", lambda _: 999),
    "VAE encoder": (autoencoder.AutoencoderKL, "encode", before(lambda self, images: (self, images.flip(-1)))),
    "VAE decoder": (autoencoder.AutoencoderKL, "decode", before(lambda self, latents: (self, latents * 1.01))),
    "image processor": (image_processor, "array_to_pil", before(lambda array: (array * 0.99,))),
}
QUICK = [name for name in BUGS if name != "transformer, 57 blocks"]


def assert_bug_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, bug = BUGS[name]
    (case,) = [case for case in cases(None) if case.name == name]
    monkeypatch.setattr(owner, attribute, bug(getattr(owner, attribute)))
    assert not measure(case, torch.float32).within


@pytest.mark.parametrize("name", QUICK)
def test_planted_bug_breaks_the_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_bug_is_seen(name, monkeypatch)


@pytest.mark.slow
def test_planted_bug_breaks_the_long_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_bug_is_seen("transformer, 57 blocks", monkeypatch)


def test_every_row_has_its_bug() -> None:
    assert BUGS.keys() == {case.name for case in cases(None)}


@pytest.mark.parametrize("name", ["CLIP tokenizer", "T5 tokenizer"])
def test_planted_bug_breaks_a_tokenizer_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if bundled() is None:
        pytest.skip("data/flux-mini is not there")
    (case,) = [case for case in cases(bundled()) if case.name == name]
    ours = {"CLIP tokenizer": parity_cases.CLIPTokenizer, "T5 tokenizer": parity_cases.T5Tokenizer}[name]
    monkeypatch.setattr(ours, "clean", lambda self, text: text.strip())
    assert not measure(case, torch.float32).within


def test_texts_are_several_hundred_different_ones() -> None:
    assert texts() == texts()
    assert len(texts()) == 300
    assert len(set(texts())) > 290
    assert "" in texts()
    assert any("<|endoftext|>" in text for text in texts())


def picture(seed: int = 0, spread: int = 256) -> Tensor:
    return torch.randint(spread, (1, 20, 50, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize(("values", "by", "same"), [(0, 0, True), (3, 1, True), (4, 1, False), (1, 2, False)])
def test_bound_of_pictures(values: int, by: int, same: bool) -> None:
    """Three of 3000 values are one in a thousand."""
    theirs = picture(spread=200)
    ours = theirs.clone()
    ours.view(-1)[:values] += by
    assert bool(same_picture(ours, theirs)) is same


def test_flat_field_is_no_picture() -> None:
    assert not same_picture(picture(spread=9), picture(spread=9))
