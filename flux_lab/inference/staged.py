"""The staged pipeline: encode, free, denoise, free, decode. At no time is more than one stage's weights in memory.

The stages hand over what they made: prompt embeddings, pooled ones and their negative counterparts go to the loop, latents to the
decoder. The loop and all else is FluxPipeline's own code, so without quantization the picture is the same.
"""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flux_lab.autoencoder import AutoencoderKL
from flux_lab.checkpoints import (
    CheckpointError,
    check_device,
    empty_weights,
    load_autoencoder,
    load_clip,
    load_scheduler,
    local_folder,
    read_model_index,
)
from flux_lab.clip import CLIPTextOutput
from flux_lab.clip_tokenizer import CLIPTokenizer
from flux_lab.image_processor import check_output_type
from flux_lab.inference.budget import parse_bytes
from flux_lab.inference.hoisting import Conditioning, rehearse
from flux_lab.inference.live_bytes import bytes_of
from flux_lab.inference.loading import folder_scheme, load_lean
from flux_lab.inference.memory import Plan, plan
from flux_lab.inference.parts import Parts
from flux_lab.inference.quantization import LOADERS, SCHEMES
from flux_lab.inference.stages import SCHEME_OF_BITS
from flux_lab.inference.streaming import streamed
from flux_lab.pipeline import FluxPipeline, FluxPipelineOutput
from flux_lab.prompt import TextEncoders, encode_prompt
from flux_lab.t5_tokenizer import T5Tokenizer

Prompt = str | Sequence[str] | None
DTYPES = (torch.float32, torch.bfloat16)


def load_staged(
    path: str | Path,
    quantize: str | None = None,
    memory_budget: int | str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    hoisted: bool = True,
    stream: bool = False,
) -> "StagedPipeline":
    """A pipeline that loads each of its models when it is needed and frees it when it is not. Called like FluxPipeline.

    `path`: a folder in the diffusers layout, a hub id, or what `quantize_checkpoint` wrote. `quantize`: "int8", "nf4" or None, for T5
    and the transformer. `memory_budget`, such as "16GB": the plan is compared with it, here and at each call. `hoisted`: modulation is
    evaluated before the loop and its weights dropped. `stream`: T5 and the transformer are read from disk block by block.
    Raises BudgetError with a suggestion when the plan is above the budget, CheckpointError for a folder that cannot be read or is
    quantized otherwise, ValueError for a device that is not there and all other arguments.
    """
    return StagedPipeline(local_folder(path), quantize, memory_budget, device, dtype, hoisted, stream)


class StagedPipeline:
    """See `load_staged`."""

    def __init__(
        self,
        folder: Path,
        quantize: str | None,
        memory_budget: int | str | None,
        device: torch.device | str,
        dtype: torch.dtype,
        hoisted: bool,
        stream: bool,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {list(DTYPES)}, got {dtype}")
        read_model_index(folder)
        self.folder, self.dtype, self.hoisted, self.stream = folder, dtype, hoisted, stream
        self.device, self.memory_budget = check_device(device), parse_bytes(memory_budget)
        self.quantize = self._scheme(quantize)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.tokenizer_2 = T5Tokenizer.from_pretrained(folder / "tokenizer_2")
        self.parts = Parts.from_folder(folder, self.tokenizer_2.model_max_length)
        self.progress_bar: dict[str, Any] = {}
        self.plan()

    def _scheme(self, quantize: str | None) -> str | None:
        """What T5 and the transformer will be: as asked for, or as their files are."""
        if quantize not in (None, *SCHEMES):
            raise ValueError(f"quantize: expected one of {[None, *SCHEMES]}, got {quantize!r}")
        for part in LOADERS:
            stored = folder_scheme(self.folder / part)
            if stored != quantize and not (quantize is None or stored is None):
                raise CheckpointError(self.folder / part, f"weights quantized as {quantize}", stored)
            if self.stream and quantize is not None and stored is None:
                how = f"quantize_checkpoint({str(self.folder)!r}, new_folder, {quantize!r}) writes them"
                raise ValueError(f"quantize: weights are streamed as they are on disk, expected quantized ones; {how}")
            quantize = quantize or stored
        return quantize

    def plan(self, **settings: Any) -> Plan:
        """The memory plan of a call, `settings` as `memory.plan` takes them. Raises BudgetError when it is above the budget."""
        plain = 32 if self.dtype == torch.float32 else 16
        bits = next((bits for bits, scheme in SCHEME_OF_BITS.items() if scheme and scheme == self.quantize), plain)
        made = plan(self.parts, bits=bits, dtype=self.dtype, hoisted=self.hoisted, stream=self.stream, **settings)
        made.check(self.memory_budget)
        return made

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of tqdm for the bar of the loop; `disable=True` hides it."""
        self.progress_bar = options

    def __call__(
        self,
        prompt: Prompt = None,
        prompt_2: Prompt = None,
        *,
        negative_prompt: Prompt = None,
        negative_prompt_2: Prompt = None,
        max_sequence_length: int | None = None,
        output_type: str = "pil",
        **arguments: Any,
    ) -> FluxPipelineOutput:
        """Generate images. The arguments are those of FluxPipeline. Raises its errors, and BudgetError, before anything is loaded."""
        check_output_type(output_type)
        batch = self._pictures(
            prompt,
            prompt_2,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            max_sequence_length=max_sequence_length,
            **arguments,
        )
        negative = arguments.get("true_cfg_scale", 1.0) > 1
        texts = {"": (prompt, prompt_2)} if arguments.get("prompt_embeds") is None else {}
        if negative and negative_prompt is not None:
            texts["negative_"] = (negative_prompt, negative_prompt_2)
        made = self.plan(batch=batch, negative=negative, length=max_sequence_length, **_settings(arguments))
        if texts:
            arguments |= self.encode(texts, made, max_sequence_length=max_sequence_length)
            free(self.device)
        latents = self.denoise(made, **arguments)
        free(self.device)
        return FluxPipelineOutput(latents if output_type == "latent" else self.decode(latents, made, output_type))

    def _pictures(self, *prompts: Prompt, **arguments: Any) -> int:
        """How many are asked for. Raises FluxPipeline's errors for arguments that do not fit: its loop runs, on texts of zeros."""
        pipe = self._pipeline()
        pipe.text_encoder, pipe.text_encoder_2 = _BlankCLIP(self.parts.text_encoder), _BlankT5(self.parts.text_encoder_2)
        *_, pooled = rehearse(pipe, *prompts, **_of_the_loop(arguments))[0]
        return len(pooled)

    # ---- the three stages: each loads, computes, and frees when it returns

    @torch.no_grad()
    def encode(self, texts: dict[str, tuple[Prompt, Prompt]], made: Plan, **options: Any) -> dict[str, Tensor]:
        """Embeddings by the names under which the loop takes them. `texts`: (prompt, prompt_2) under "", negative ones as "negative_"."""
        clip = load_clip(self.folder / "text_encoder", self.dtype, self.device)
        with self._model("text_encoder_2", made["encode"].activations + bytes_of(clip)) as t5:
            encoders = TextEncoders(self.tokenizer, clip, self.tokenizer_2, t5)
            embeds = {}
            for sign, (prompt, prompt_2) in texts.items():
                text = encode_prompt(encoders, prompt, prompt_2, **options)
                embeds |= {f"{sign}prompt_embeds": text.prompt_embeds, f"{sign}pooled_prompt_embeds": text.pooled_prompt_embeds}
        return embeds

    def denoise(self, made: Plan, **arguments: Any) -> Tensor:
        """Packed latents at the end of the loop."""
        pipe = self._pipeline()
        conditionings = rehearse(pipe, **_of_the_loop(arguments)) if self.hoisted else ()
        with self._model("transformer", made["denoise"].activations, conditionings) as transformer:
            pipe.transformer = transformer
            return pipe(output_type="latent", **arguments).images

    def decode(self, latents: Tensor, made: Plan, output_type: str = "pil") -> Any:
        """Images from packed latents."""
        pipe = self._pipeline()
        pipe.vae = load_autoencoder(self.folder / "vae", self.dtype, self.device)
        return pipe.decode(latents, made.settings["height"], made.settings["width"], output_type)

    @contextlib.contextmanager
    def _model(self, part: str, beside: int, conditionings: Sequence[Conditioning] = ()) -> Iterator[nn.Module]:
        """T5 or the transformer for a `with` block. `beside`: bytes of the budget that are not for its weights."""
        folder = self.folder / part
        if self.stream:
            budget = None if self.memory_budget is None else self.memory_budget - beside
            with streamed(folder, budget, self.device, self.dtype, conditionings) as model:
                yield model
        else:
            yield load_lean(folder, self.quantize, self.device, self.dtype, conditionings)

    def _pipeline(self) -> FluxPipeline:
        """A pipeline without weights: its loop, its scheduler, and the sizes of its models."""
        with empty_weights():
            vae = AutoencoderKL(self.parts.vae)
        pipe = FluxPipeline(
            transformer=_Sizes(self.parts.transformer),
            scheduler=load_scheduler(self.folder / "scheduler"),
            vae=vae,
            text_encoder=None,
            tokenizer=self.tokenizer,
            text_encoder_2=None,
            tokenizer_2=self.tokenizer_2,
        )
        pipe.set_progress_bar_config(**self.progress_bar)
        return pipe


class _Sizes(nn.Module):
    """A model of which only the configuration is there, and one parameter of no size, which tells the device."""

    def __init__(self, config: Any):
        super().__init__()
        self.config, self.nothing = config, nn.Parameter(torch.empty(0))


class _BlankCLIP(_Sizes):
    """Stands in for CLIP: zeros for every text."""

    def forward(self, input_ids: Tensor) -> CLIPTextOutput:
        zeros = torch.zeros(*input_ids.shape, self.config.hidden_size)
        return CLIPTextOutput(zeros, zeros[:, 0])


class _BlankT5(_Sizes):
    """Stands in for T5: zeros for every text."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return torch.zeros(*input_ids.shape, self.config.d_model)


def _of_the_loop(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those that `FluxPipeline.steps` takes."""
    return {name: value for name, value in arguments.items() if not name.startswith("callback_on_step_end")}


def _settings(arguments: dict[str, Any]) -> dict[str, int]:
    """What the memory plan needs to know of the loop's arguments."""
    settings = {name: arguments[name] for name in ("height", "width") if arguments.get(name) is not None}
    sigmas = arguments.get("sigmas")
    return settings | {"steps": arguments.get("num_inference_steps", 28) if sigmas is None else len(sigmas)}


def free(device: torch.device) -> None:
    """Give back what the allocator of a GPU keeps of models that are gone."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
