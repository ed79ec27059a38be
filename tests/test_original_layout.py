"""flux_lab.original_layout: the table of names. That the tensors arrive where they belong is shown in test_checkpoints.py."""

import pytest

from flux_lab.original_layout import AUTOENCODER_RENAMING, LINEAR, REVERSE, SPLIT, SWAP, TRANSFORMER_RENAMING, rename


@pytest.mark.parametrize(
    ("key", "names", "note"),
    [
        ("txt_in.bias", ("context_embedder.bias",), ""),
        ("double_blocks.12.img_attn.norm.query_norm.scale", ("transformer_blocks.12.attn.norm_q.weight",), ""),
        ("double_blocks.3.txt_attn.qkv.bias", tuple(f"transformer_blocks.3.attn.add_{x}_proj.bias" for x in "qkv"), SPLIT),
        ("final_layer.adaLN_modulation.1.weight", ("norm_out.linear.weight",), SWAP),
    ],
)
def test_transformer(key, names, note):
    assert rename(key, TRANSFORMER_RENAMING) == (names, note)


@pytest.mark.parametrize(
    ("key", "names", "note"),
    [
        ("decoder.up.3.block.0.nin_shortcut.weight", ("decoder.up_blocks.0.resnets.0.conv_shortcut.weight",), REVERSE),
        ("encoder.down.3.block.1.norm2.bias", ("encoder.down_blocks.3.resnets.1.norm2.bias",), ""),
        ("encoder.mid.attn_1.proj_out.weight", ("encoder.mid_block.attentions.0.to_out.0.weight",), LINEAR),
    ],
)
def test_autoencoder(key, names, note):
    assert rename(key, AUTOENCODER_RENAMING, levels=4) == (names, note)


def test_unknown_keys():
    assert rename("double_blocks.x.img_mod.lin.weight", TRANSFORMER_RENAMING) is None
    assert rename("encoder.down.0.attn.0.q.weight", AUTOENCODER_RENAMING, levels=4) is None
