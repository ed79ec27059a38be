"""From a prompt to what the transformer is told: T5's vectors of the words, CLIP's one vector of the whole, and the text's position ids."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor

from flux_lab.clip import CLIPTextModel
from flux_lab.clip_tokenizer import CLIPTokenizer
from flux_lab.shapes import shaped
from flux_lab.t5 import T5EncoderModel
from flux_lab.t5_tokenizer import T5Tokenizer
from flux_lab.tokenizer import Tokenizer, check_texts

MAX_SEQUENCE_LENGTH = 512


@dataclass(frozen=True)
class TextEncoders:
    """The four parts that read a prompt, under the names of their folders in a checkpoint: CLIP's two, and with `_2` T5's."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    tokenizer_2: T5Tokenizer
    text_encoder_2: T5EncoderModel


class PromptEmbeds(NamedTuple):
    """What the transformer takes of the prompt.

    `prompt_embeds` [batch, length, joint_dim], `pooled_prompt_embeds` [batch, pooled_dim], `text_ids` [length, 3], all zero.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    text_ids: Tensor


@torch.no_grad()
@shaped
def encode_prompt(
    encoders: TextEncoders,
    prompt: str | Sequence[str] | None = None,
    prompt_2: str | Sequence[str] | None = None,
    num_images_per_prompt: int = 1,
    max_sequence_length: int | None = None,
    prompt_embeds: Float[Tensor, "batch length joint_dim"] | None = None,
    pooled_prompt_embeds: Float[Tensor, "batch pooled_dim"] | None = None,
) -> PromptEmbeds:
    """Encode one or several prompts: `prompt` by CLIP, `prompt_2` (by default the same) by T5.

    Every prompt is repeated `num_images_per_prompt` times, its copies next to each other. `max_sequence_length` is the number of T5
    tokens, by default what `tokenizer_2` says. Where `prompt_embeds` and `pooled_prompt_embeds` are given, they are repeated likewise.
    Warns when a prompt is too long, with the words that are lost. Raises TypeError and ValueError for arguments that do not fit
    together. Source: diffusers `FluxPipeline.encode_prompt`.
    """
    images = _check_images(num_images_per_prompt)
    if prompt_embeds is not None or pooled_prompt_embeds is not None:
        _check_given(prompt, prompt_2, prompt_embeds, pooled_prompt_embeds)
    else:
        length = _check_length(max_sequence_length, encoders.tokenizer_2)
        prompts, prompts_2 = _check_prompts(prompt, prompt_2)
        clip_ids = token_ids(encoders.tokenizer, prompts, encoders.tokenizer.model_max_length, "prompt", encoders.text_encoder)
        t5_ids = token_ids(encoders.tokenizer_2, prompts_2, length, "prompt_2" if prompt_2 else "prompt", encoders.text_encoder_2)
        pooled_prompt_embeds, prompt_embeds = encoders.text_encoder(clip_ids).pooler_output, encoders.text_encoder_2(t5_ids)
    pooled_prompt_embeds = repeat(pooled_prompt_embeds, "batch dim -> (batch images) dim", images=images)
    prompt_embeds = repeat(prompt_embeds, "batch length dim -> (batch images) length dim", images=images)
    return PromptEmbeds(prompt_embeds, pooled_prompt_embeds, prompt_embeds.new_zeros(prompt_embeds.shape[1], 3))


def token_ids(
    tokenizer: Tokenizer, texts: list[str], length: int, argument: str, encoder: CLIPTextModel | T5EncoderModel
) -> Int[Tensor, "batch length"]:
    """The ids of `texts`, `length` each, where the encoder is. Warns when words are lost, naming the `argument` they came in.

    Raises ValueError when the tokenizer gives an id that the encoder has no vector for.
    """
    for text in texts:
        ids = tokenizer.encode(text)
        if len(ids) > length:
            lost = tokenizer.decode(ids[length - 1 : -1])
            message = f"{argument}: {type(encoder).__name__} reads {length} tokens, this prompt has {len(ids)}; lost: {lost!r}"
            warnings.warn(message, stacklevel=5)  # the caller of encode_prompt, which has two decorators
    ids = tokenizer(texts, max_length=length)
    vocab_size = encoder.config.vocab_size
    if int(ids.max()) >= vocab_size:
        raise ValueError(
            f"{type(tokenizer).__name__} gives id {int(ids.max())}, {type(encoder).__name__} has vocab_size={vocab_size}: not a pair"
        )
    return ids.to(next(encoder.parameters()).device)


def _check_given(prompt, prompt_2, prompt_embeds: Tensor | None, pooled_prompt_embeds: Tensor | None) -> None:
    for name, value in (("prompt_embeds", prompt_embeds), ("pooled_prompt_embeds", pooled_prompt_embeds)):
        if value is None:
            raise ValueError(f"{name}: expected a tensor, got None: prompt_embeds and pooled_prompt_embeds are given together")
    for name, value in (("prompt", prompt), ("prompt_2", prompt_2)):
        if value is not None:
            raise ValueError(f"{name}: expected None beside prompt_embeds, got {value!r}")


def _check_length(max_sequence_length: int | None, tokenizer_2: T5Tokenizer) -> int:
    length = tokenizer_2.model_max_length if max_sequence_length is None else max_sequence_length
    if not isinstance(length, int):
        raise TypeError(f"max_sequence_length: expected an integer, got {type(length).__name__}")
    if not 2 <= length <= MAX_SEQUENCE_LENGTH:
        raise ValueError(f"max_sequence_length: expected 2 to {MAX_SEQUENCE_LENGTH}, got {length}")
    return length


def _check_images(num_images_per_prompt: int) -> int:
    if not isinstance(num_images_per_prompt, int):
        raise TypeError(f"num_images_per_prompt: expected an integer, got {type(num_images_per_prompt).__name__}")
    if num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt: expected at least 1, got {num_images_per_prompt}")
    return num_images_per_prompt


def _check_prompts(prompt: str | Sequence[str] | None, prompt_2: str | Sequence[str] | None) -> tuple[list[str], list[str]]:
    prompts = check_texts(prompt, "prompt")
    # As upstream, an empty `prompt_2` means the same as none.
    prompts_2 = check_texts(prompt_2, "prompt_2") if prompt_2 else prompts
    if len(prompts) != len(prompts_2):
        raise ValueError(f"prompt_2: expected as many prompts as in prompt, {len(prompts)}, got {len(prompts_2)}")
    return prompts, prompts_2
