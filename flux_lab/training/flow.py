"""Stage 5: rectified flow.

    python -m flux_lab.training.flow --out runs/flow --layers 5 10 --steps 4000
    python -m flux_lab.training.flow --out runs/flow2 --initial runs/flow/transformer --steps 5000

x_t = (1 - t) x0 + t noise on the scaled latents; the target is noise - x0. t is logit-normal and shifted as in sampling; one caption
in ten is replaced by the empty one, so that true classifier-free guidance works. Of the others, four in ten are kept from CLIP: its one
vector is easy to follow but says little about which word belongs to which, and the transformer shall learn to read T5's. Beside the
velocity it learns to say what stands where (`layout.py`). Writes `transformer/` (a diffusers folder).
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from flux_lab.checkpoints import load_clip, load_t5, load_transformer, save_model
from flux_lab.clip import CLIPTextModel
from flux_lab.clip_tokenizer import CLIPTokenizer
from flux_lab.config import FLUX_MINI, FluxTransformer2DConfig
from flux_lab.latents import PATCH, pack_latents, prepare_latent_image_ids
from flux_lab.scheduler import calculate_shift
from flux_lab.t5 import T5EncoderModel
from flux_lab.t5_tokenizer import T5Tokenizer
from flux_lab.training.layout import LayoutHead, scene_layouts
from flux_lab.training.loop import Settings, is_main_process, load_trained, train
from flux_lab.training.texts import caption_ids
from flux_lab.transformer import FluxTransformer2DModel

DROP_TEXT = 0.1
DROP_POOLED = 0.4


class Encoders(nn.Module):
    """The frozen text encoders: ids to (token vectors, pooled vector)."""

    def __init__(self, clip: CLIPTextModel, t5: T5EncoderModel):
        super().__init__()
        self.clip, self.t5 = clip.eval().requires_grad_(False), t5.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, clip_ids: Int[Tensor, "batch clip_length"], t5_ids: Int[Tensor, "batch length"]) -> tuple[Tensor, Tensor]:
        return self.t5(t5_ids), self.clip(clip_ids).pooler_output


def predict_velocity(
    transformer: FluxTransformer2DModel,
    x_t: Float[Tensor, "batch channels height width"],
    t: Float[Tensor, "batch"],
    text: tuple[Tensor, Tensor],
    guidance: Float[Tensor, "batch"],
) -> Float[Tensor, "batch tokens patch_channels"]:
    """One call of the transformer on unpacked latents."""
    return predict_packed_velocity(transformer, pack_latents(x_t), t, text, image_ids(x_t), guidance)


def image_ids(latents: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "tokens axes"]:
    """The ids of the tokens that unpacked latents become."""
    return prepare_latent_image_ids(latents.shape[2] // PATCH, latents.shape[3] // PATCH, device=latents.device)


def predict_packed_velocity(
    transformer: FluxTransformer2DModel,
    x_t: Float[Tensor, "batch tokens patch_channels"],
    t: Float[Tensor, "batch"],
    text: tuple[Tensor, Tensor],
    img_ids: Float[Tensor, "tokens axes"],
    guidance: Float[Tensor, "batch"],
) -> Float[Tensor, "batch tokens patch_channels"]:
    """One call of the transformer on packed latents. A model without guidance embedding is not told `guidance`."""
    encoder_hidden_states, pooled_projections = text
    return transformer(
        hidden_states=x_t,
        encoder_hidden_states=encoder_hidden_states,
        pooled_projections=pooled_projections,
        timestep=t,
        img_ids=img_ids,
        txt_ids=torch.zeros(encoder_hidden_states.shape[1], 3, device=x_t.device),
        guidance=guidance if transformer.config.guidance_embeds else None,
    )


class FlowLoss(nn.Module):
    """The transformer with its loss, and what stands where with a weight. The guidance embedding sees 1: no guidance."""

    def __init__(self, transformer: FluxTransformer2DModel, encoders: Encoders, layout_weight: float = 0.0):
        super().__init__()
        self.transformer, self.encoders, self.layout_weight = transformer, encoders, layout_weight
        self.layout_head = LayoutHead(transformer) if layout_weight else None

    def forward(
        self, latents: Tensor, noise: Tensor, t: Tensor, clip_ids: Tensor, t5_ids: Tensor, layouts: Tensor | None = None
    ) -> dict[str, Tensor]:
        x_t = torch.lerp(latents, noise, t[:, None, None, None])
        velocity = predict_velocity(self.transformer, x_t, t, self.encoders(clip_ids, t5_ids), torch.ones_like(t))
        flow_loss = F.mse_loss(velocity, pack_latents(noise - latents))
        if self.layout_head is None:
            return {"loss": flow_loss}
        layout_loss = self.layout_head.loss(layouts)
        return {"loss": flow_loss + self.layout_weight * layout_loss, "flow_loss": flow_loss, "layout_loss": layout_loss}


class FlowBatches:
    """Latents, noise, times and captions, each drawn anew for every step; with `layouts` also what stands where."""

    def __init__(self, scenes: Path, tokenizers: Path, latents: Path, batch_size: int, layouts: bool = False):
        ids = caption_ids(scenes, tokenizers)
        self.latents = load_file(latents)["latents"]
        self.layouts = scene_layouts(scenes) if layouts else None
        self.clip_ids, self.t5_ids = ids.clip, ids.t5
        self.no_clip = CLIPTokenizer.from_pretrained(tokenizers / "tokenizer")("")
        self.no_t5 = T5Tokenizer.from_pretrained(tokenizers / "tokenizer_2")("")
        self.batch_size = batch_size
        tokens = self.latents.shape[2] * self.latents.shape[3] // PATCH**2
        self.shift = math.exp(calculate_shift(tokens))

    def __call__(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        count = self.batch_size
        which = torch.randint(len(self.latents), (count,), generator=generator)
        caption = torch.randint(self.clip_ids.shape[1], (count,), generator=generator)
        kept = (torch.rand(count, 1, generator=generator) >= DROP_TEXT).long()
        t = torch.sigmoid(torch.randn(count, generator=generator))
        latents = self.latents[which].float()
        noise = torch.randn(latents.shape, generator=generator)
        pooled = kept * (torch.rand(count, 1, generator=generator) >= DROP_POOLED).long()
        return {
            "latents": latents,
            "noise": noise,
            "t": self.shifted(t),
            "clip_ids": torch.where(pooled == 1, self.clip_ids[which, caption].long(), self.no_clip),
            "t5_ids": torch.where(kept == 1, self.t5_ids[which, caption].long(), self.no_t5),
        } | ({} if self.layouts is None else {"layouts": self.layouts[which]})

    def shifted(self, t: Tensor) -> Tensor:
        """Levels as the scheduler shifts them for a picture of this size."""
        return self.shift * t / (1 + (self.shift - 1) * t)


def initialize(transformer: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """Xavier for every linear, then zeros in all modulations and the output: every block starts as the identity (DiT, section 3.2)."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            modulates = "norm" in name
            if modulates or module is transformer.proj_out:
                nn.init.zeros_(module.weight)
    return transformer


def compile_blocks(transformer: FluxTransformer2DModel) -> None:
    """torch.compile one block of each kind; the others share the result, as their parameters are inputs of the graph."""
    for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
        block.compile(dynamic=False)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that this stage and guidance distillation share."""
    parser.add_argument("--scenes", type=Path, default=Path("runs/scenes"))
    parser.add_argument("--tokenizers", type=Path, default=Path("runs/tokenizers"))
    parser.add_argument("--latents", type=Path, default=Path("runs/vae/latents.safetensors"))
    parser.add_argument("--clip", type=Path, default=Path("runs/clip/text_encoder"))
    parser.add_argument("--t5", type=Path, default=Path("runs/t5/text_encoder_2"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--decay", type=float, default=0.3, help="share of the steps over which the rate falls to zero")
    parser.add_argument("--muon", type=float, default=3.0, help="Muon's rate for the blocks' matrices, in multiples of --rate; 0: AdamW")
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep", type=int, default=0, metavar="STEPS", help="keep a checkpoint every so many (a multiple of 100): see curve.py"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks (needs a C++ compiler)")


def settings_of(options: argparse.Namespace) -> Settings:
    return Settings(
        steps=options.steps,
        batch_size=options.batch,
        learning_rate=options.rate,
        decay=options.decay,
        weight_decay=0.01,
        muon=options.muon,
        ema=options.ema,
        seed=options.seed,
        save_every=100,
        keep_every=options.keep,
    )


def export(out: Path, transformer: FluxTransformer2DModel) -> None:
    """Write the trained (averaged) transformer of a run to `out/transformer`."""
    if not is_main_process():
        return
    exported = FluxTransformer2DModel(transformer.config)
    exported.load_state_dict(load_trained(out, "transformer"))
    save_model(exported, out / "transformer")


def mini_config(options: argparse.Namespace) -> FluxTransformer2DConfig:
    """The miniature's configuration for the widths of the given text encoders and the asked depth."""
    clip, t5 = (json.loads((folder / "config.json").read_text()) for folder in (options.clip, options.t5))
    double, single = options.layers
    return dataclasses.replace(
        FLUX_MINI, num_layers=double, num_single_layers=single, joint_attention_dim=t5["d_model"], pooled_projection_dim=clip["hidden_size"]
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/flow"))
    parser.add_argument(
        "--layers", type=int, nargs=2, default=(FLUX_MINI.num_layers, FLUX_MINI.num_single_layers), metavar=("DOUBLE", "SINGLE")
    )
    parser.add_argument("--initial", type=Path, help="a transformer folder to start from, in place of random weights")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--layout", type=float, default=0.5, help="weight of the question what stands where; 0: not asked")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    transformer = load_transformer(options.initial) if options.initial else initialize(FluxTransformer2DModel(mini_config(options)))
    transformer.float().requires_grad_(True)
    if options.compile:
        compile_blocks(transformer)
    encoders = Encoders(load_clip(options.clip), load_t5(options.t5))
    batches = FlowBatches(options.scenes, options.tokenizers, options.latents, options.batch, layouts=bool(options.layout))
    train(FlowLoss(transformer, encoders, options.layout), batches, options.out, settings_of(options))
    export(options.out, transformer)


if __name__ == "__main__":
    main()
