"""The linear layers of the package bitsandbytes, whose kernels for GPUs do in one pass what int8.py and nf4.py do step by step."""

from torch import nn

from flux_lab.inference.int8 import THRESHOLD


def from_linear(linear: nn.Linear, scheme: str) -> nn.Module:
    """bitsandbytes' layer for `scheme`, "int8" or "nf4", with the weights of `linear`, quantized where `linear` is.

    Raises ImportError when the package is missing.
    """
    try:
        import bitsandbytes.nn as layers
    except ImportError as error:
        raise ImportError("backend='bitsandbytes': the package is missing; `pip install 'flux-lab[bitsandbytes]'`") from error
    sizes = {"input_features": linear.in_features, "output_features": linear.out_features, "bias": linear.bias is not None}
    if scheme == "int8":
        quantized = layers.Linear8bitLt(**sizes, has_fp16_weights=False, threshold=THRESHOLD, device="meta")
        quantized.weight = layers.Int8Params(linear.weight.detach(), requires_grad=False, has_fp16_weights=False)
    else:
        quantized = layers.Linear4bit(**sizes, compute_dtype=linear.weight.dtype, quant_type="nf4", device="meta")
        quantized.weight = layers.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4", module=quantized)
    quantized.bias = linear.bias
    # Moving the layer to a device is what quantizes it.
    return quantized.to(linear.weight.device)
