"""The real FLUX.1 on hardware that people have: plan its memory, quantize it, hoist its modulation, run it in stages or from disk."""

from flux_lab.inference.fast import fast
from flux_lab.inference.hoisting import hoist, rehearse
from flux_lab.inference.memory import BudgetError, plan
from flux_lab.inference.quantization import load_quantized, quantize, quantize_checkpoint, save_quantized
from flux_lab.inference.staged import load_staged
from flux_lab.inference.streaming import offloaded, streamed

__all__ = [
    "BudgetError",
    "fast",
    "hoist",
    "load_quantized",
    "load_staged",
    "offloaded",
    "plan",
    "quantize",
    "quantize_checkpoint",
    "rehearse",
    "save_quantized",
    "streamed",
]
