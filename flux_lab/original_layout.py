"""The names of the original checkpoints of Black Forest Labs, beside ours: one table for the transformer, one for the autoencoder."""

import re
from typing import NamedTuple


class Renaming(NamedTuple):
    """One row of a table: a module of the original layout and ours. `{i}` stands for any number, `{layer}` and `{side}` for a word.

    Several names of ours share the rows of one original tensor, in this order.
    """

    original: str
    ours: tuple[str, ...]
    note: str = ""


SPLIT = "split by rows"
SWAP = "the two halves change places: shift, scale -> scale, shift"
LINEAR = "1x1 convolution -> linear"
REVERSE = "the levels count the other way"


def _attention(prefix: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name in names)


_DOUBLE, _SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
TRANSFORMER_RENAMING = (
    Renaming("time_in.in_layer", ("time_text_embed.timestep_embedder.linear_1",)),
    Renaming("time_in.out_layer", ("time_text_embed.timestep_embedder.linear_2",)),
    Renaming("guidance_in.in_layer", ("time_text_embed.guidance_embedder.linear_1",)),
    Renaming("guidance_in.out_layer", ("time_text_embed.guidance_embedder.linear_2",)),
    Renaming("vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",)),
    Renaming("vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",)),
    Renaming("txt_in", ("context_embedder",)),
    Renaming("img_in", ("x_embedder",)),
    Renaming("double_blocks.{i}.img_mod.lin", (f"{_DOUBLE}.norm1.linear",)),
    Renaming("double_blocks.{i}.txt_mod.lin", (f"{_DOUBLE}.norm1_context.linear",)),
    Renaming("double_blocks.{i}.img_attn.qkv", _attention(f"{_DOUBLE}.attn", "to_q", "to_k", "to_v"), SPLIT),
    Renaming("double_blocks.{i}.txt_attn.qkv", _attention(f"{_DOUBLE}.attn", "add_q_proj", "add_k_proj", "add_v_proj"), SPLIT),
    Renaming("double_blocks.{i}.img_attn.norm.query_norm", (f"{_DOUBLE}.attn.norm_q",)),
    Renaming("double_blocks.{i}.img_attn.norm.key_norm", (f"{_DOUBLE}.attn.norm_k",)),
    Renaming("double_blocks.{i}.txt_attn.norm.query_norm", (f"{_DOUBLE}.attn.norm_added_q",)),
    Renaming("double_blocks.{i}.txt_attn.norm.key_norm", (f"{_DOUBLE}.attn.norm_added_k",)),
    Renaming("double_blocks.{i}.img_attn.proj", (f"{_DOUBLE}.attn.to_out.0",)),
    Renaming("double_blocks.{i}.txt_attn.proj", (f"{_DOUBLE}.attn.to_add_out",)),
    Renaming("double_blocks.{i}.img_mlp.0", (f"{_DOUBLE}.ff.net.0.proj",)),
    Renaming("double_blocks.{i}.img_mlp.2", (f"{_DOUBLE}.ff.net.2",)),
    Renaming("double_blocks.{i}.txt_mlp.0", (f"{_DOUBLE}.ff_context.net.0.proj",)),
    Renaming("double_blocks.{i}.txt_mlp.2", (f"{_DOUBLE}.ff_context.net.2",)),
    Renaming("single_blocks.{i}.modulation.lin", (f"{_SINGLE}.norm.linear",)),
    Renaming("single_blocks.{i}.linear1", (*_attention(f"{_SINGLE}.attn", "to_q", "to_k", "to_v"), f"{_SINGLE}.proj_mlp"), SPLIT),
    Renaming("single_blocks.{i}.norm.query_norm", (f"{_SINGLE}.attn.norm_q",)),
    Renaming("single_blocks.{i}.norm.key_norm", (f"{_SINGLE}.attn.norm_k",)),
    Renaming("single_blocks.{i}.linear2", (f"{_SINGLE}.proj_out",)),
    Renaming("final_layer.adaLN_modulation.1", ("norm_out.linear",), SWAP),
    Renaming("final_layer.linear", ("proj_out",)),
)
AUTOENCODER_RENAMING = (
    Renaming("{side}.conv_in", ("{side}.conv_in",)),
    Renaming("encoder.down.{i}.block.{j}.nin_shortcut", ("encoder.down_blocks.{i}.resnets.{j}.conv_shortcut",)),
    Renaming("encoder.down.{i}.block.{j}.{layer}", ("encoder.down_blocks.{i}.resnets.{j}.{layer}",)),
    Renaming("encoder.down.{i}.downsample.conv", ("encoder.down_blocks.{i}.downsamplers.0.conv",)),
    Renaming("{side}.mid.block_1.{layer}", ("{side}.mid_block.resnets.0.{layer}",)),
    Renaming("{side}.mid.attn_1.norm", ("{side}.mid_block.attentions.0.group_norm",)),
    Renaming("{side}.mid.attn_1.q", ("{side}.mid_block.attentions.0.to_q",), LINEAR),
    Renaming("{side}.mid.attn_1.k", ("{side}.mid_block.attentions.0.to_k",), LINEAR),
    Renaming("{side}.mid.attn_1.v", ("{side}.mid_block.attentions.0.to_v",), LINEAR),
    Renaming("{side}.mid.attn_1.proj_out", ("{side}.mid_block.attentions.0.to_out.0",), LINEAR),
    Renaming("{side}.mid.block_2.{layer}", ("{side}.mid_block.resnets.1.{layer}",)),
    Renaming("decoder.up.{i}.block.{j}.nin_shortcut", ("decoder.up_blocks.{last-i}.resnets.{j}.conv_shortcut",), REVERSE),
    Renaming("decoder.up.{i}.block.{j}.{layer}", ("decoder.up_blocks.{last-i}.resnets.{j}.{layer}",), REVERSE),
    Renaming("decoder.up.{i}.upsample.conv", ("decoder.up_blocks.{last-i}.upsamplers.0.conv",), REVERSE),
    Renaming("{side}.norm_out", ("{side}.conv_norm_out",)),
    Renaming("{side}.conv_out", ("{side}.conv_out",)),
    Renaming("quant_conv", ("quant_conv",)),
    Renaming("post_quant_conv", ("post_quant_conv",)),
)
_PLACEHOLDERS = {"i": r"\d+", "j": r"\d+", "side": "encoder|decoder", "layer": "norm1|norm2|conv1|conv2"}


def _pattern(row: Renaming) -> re.Pattern:
    """The row as a regular expression for a whole key. A `scale`, of an RMSNorm, is a `weight` of ours."""
    escaped = re.sub(r"\\{(\w+)\\}", lambda found: f"(?P<{found[1]}>{_PLACEHOLDERS[found[1]]})", re.escape(row.original))
    return re.compile(escaped + r"\.(?P<kind>weight|bias|scale)")


def rename(key: str, table: tuple[Renaming, ...], levels: int = 0) -> tuple[tuple[str, ...], str] | None:
    """Our names for a key of the original layout, and the note of its row; None for an unknown key.

    `levels` is the number of levels of the autoencoder: its decoder counts them the other way.
    """
    for row in table:
        if found := _pattern(row).fullmatch(key):
            words = found.groupdict()
            kind = "bias" if words.pop("kind") == "bias" else "weight"
            words["last-i"] = levels - 1 - int(words.get("i", 0))
            return tuple(f"{name.format(**words)}.{kind}" for name in row.ours), row.note
    return None
