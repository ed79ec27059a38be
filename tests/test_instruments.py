"""Anatomies, tables, budgets: every number is computed from configurations, and equal to what running models have."""

import json
from pathlib import Path

import pytest
import torch

from flux_lab import config
from flux_lab.autoencoder import AutoencoderKL
from flux_lab.instruments import FLUX_1_DEV, MINIATURE, Anatomy, Table, budget, config_table, model_index, on_meta, parameter_counts
from flux_lab.instruments.config_table import MEANINGS, PARTS
from flux_lab.latents import pack_latents, prepare_latent_image_ids, unpack_latents

TINY = Anatomy(
    name="tiny",
    transformer=config.TINY,
    vae=config.TINY_VAE,
    text_encoder=config.TINY_CLIP,
    text_encoder_2=config.TINY_T5,
    scheduler=config.FLUX_DEV_SCHEDULER,
    length=11,
)
ANATOMIES = pytest.mark.parametrize("anatomy", [TINY, MINIATURE, FLUX_1_DEV], ids=lambda anatomy: anatomy.name)


def test_numbers_of_flux_1_dev() -> None:
    """As the published checkpoints have them."""
    assert parameter_counts(FLUX_1_DEV) == {
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
        "transformer": 11_901_408_320,
        "vae": 83_819_683,
    }
    assert FLUX_1_DEV.tokens == 4096
    assert MINIATURE.tokens == 64


@ANATOMIES
def test_shapes_are_those_of_the_running_models(anatomy: Anatomy) -> None:
    shapes, meta = anatomy.shapes(), torch.device("meta")
    pooled = on_meta("text_encoder", anatomy)(torch.zeros(shapes["clip_ids"], dtype=torch.long, device=meta)).pooler_output
    embeds = on_meta("text_encoder_2", anatomy)(torch.zeros(shapes["t5_ids"], dtype=torch.long, device=meta))
    tokens = pack_latents(torch.empty(shapes["latents"], device=meta))
    side = shapes["latents"][-1] // 2
    img_ids, txt_ids = prepare_latent_image_ids(side, side, device=meta), torch.empty(anatomy.length, 3, device=meta)
    streams = {}
    transformer = on_meta("transformer", anatomy)
    transformer.transformer_blocks[0].register_forward_hook(lambda module, given, result: streams.update(text=result[0], image=result[1]))
    transformer.time_text_embed.register_forward_hook(lambda module, given, result: streams.update(temb=result))
    velocity = transformer(tokens, embeds, pooled, torch.empty(1, device=meta), img_ids, txt_ids, guidance=torch.empty(1, device=meta))
    pixels = anatomy.vae.sample_size
    image = on_meta("vae", anatomy).decode(unpack_latents(velocity, pixels, pixels))
    seen = {"pooled_prompt_embeds": pooled, "prompt_embeds": embeds, "tokens": tokens, "velocity": velocity, "image": image}
    seen |= {"position_ids": torch.cat([txt_ids, img_ids]), "temb": streams["temb"]}
    seen |= {
        "text_stream": streams["text"],
        "image_stream": streams["image"],
        "sequence": torch.cat([streams["text"], streams["image"]], dim=1),
    }
    assert {name: tuple(tensor.shape) for name, tensor in seen.items()} == {name: shapes[name] for name in seen}
    assert set(shapes) - set(seen) == {"clip_ids", "t5_ids", "latents", "timestep", "guidance"}


def test_budget_adds_up() -> None:
    table = budget(TINY, FLUX_1_DEV)
    assert list(table.header) == ["parameters of", "tiny", "FLUX.1-dev", "ratio"]
    *parts, total = table.rows
    assert total[1] == sum(row[1] for row in parts) == sum(parameter_counts(TINY).values())
    real = AutoencoderKL(TINY.vae)
    assert parts[-1][1] == sum(parameter.numel() for parameter in real.parameters())
    assert "11,901,408,320" in repr(table)


def test_unknown_part_is_refused() -> None:
    with pytest.raises(ValueError, match=r"part: expected one of .*, got 'unet'"):
        on_meta("unet", TINY)
    with pytest.raises(ValueError, match=r"part: expected one of .*, got 'unet'"):
        config_table("unet")


@pytest.mark.parametrize("part", PARTS)
def test_every_field_is_in_the_table_and_explained(part: str) -> None:
    table = config_table(part, TINY)
    fields = getattr(TINY, part)
    assert [row[0].strip("`") for row in table.rows] == list(MEANINGS[fields.CLASS_NAME]) == list(vars(fields))
    assert [row[1] for row in table.rows] == list(vars(fields).values())
    assert [row[2] for row in table.rows] == list(vars(getattr(FLUX_1_DEV, part)).values())


def test_model_index_lists_the_parts(tmp_path: Path) -> None:
    values = {"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    (tmp_path / "model_index.json").write_text(json.dumps(values))
    assert model_index(tmp_path).rows == [["`vae/`", "diffusers", "AutoencoderKL"], ["`tokenizer/`", "transformers", "CLIPTokenizer"]]


def test_table_in_markdown_and_as_text() -> None:
    table = Table(["`name`", "size"], [["`a|b`", 12_345], ["c", 7]])
    assert table._repr_markdown_().splitlines() == ["| `name` | size |", "| --- | ---: |", "| `a\\|b` | 12,345 |", "| c | 7 |"]
    assert repr(table).splitlines() == ["`name`    size", "a|b     12,345", "c            7"]
    with pytest.raises(ValueError, match="expected 2 cells a row"):
        Table(["a", "b"], [[1]])
