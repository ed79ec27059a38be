"""flux_lab.inference.parts: the sizes of a pipeline's models."""

from flux_lab import data_dir
from flux_lab.inference.parts import MODELS, Parts


def test_the_miniature_on_disk_has_the_sizes_of_its_preset():
    found, preset = Parts.from_folder(data_dir() / "flux-mini", 32), MODELS["mini"]
    assert found.name == "flux-mini"
    assert found.transformer == preset.transformer
    assert found.vae.block_out_channels == preset.vae.block_out_channels
    assert found.text_encoder_2.d_model == preset.text_encoder_2.d_model == preset.transformer.joint_attention_dim
    assert found.text_encoder.hidden_size == preset.transformer.pooled_projection_dim


def test_published_models_differ_in_guidance_and_length():
    dev, schnell = MODELS["dev"], MODELS["schnell"]
    assert (dev.transformer.guidance_embeds, schnell.transformer.guidance_embeds) == (True, False)
    assert (dev.length, schnell.length) == (512, 256)
    assert dev.vae == schnell.vae
