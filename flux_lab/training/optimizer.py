"""What changes the weights: AdamW, and Muon for the matrices inside transformer blocks.

Muon takes the running mean of a matrix's gradients and makes it orthogonal before it is used as the step (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon): every direction of the matrix then moves equally far, where Adam mostly moves the few
that have the largest gradients. Vectors, embeddings and the projections in and out stay with AdamW.
"""

from torch import nn
from torch.optim import AdamW, Muon, Optimizer


def is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix of one of the blocks of a FLUX transformer."""
    return "transformer_blocks." in name and parameter.ndim == 2


def optimizers_of(parameters: dict[str, nn.Parameter], weight_decay: float, muon: float = 0.0) -> dict[Optimizer, float]:
    """The optimizers of all parameters, each with the multiple of the learning rate that it is to be given.

    AdamW for everything at 1; with `muon` > 0, Muon for the inner matrices at that multiple.
    """
    inner = {name: parameter for name, parameter in parameters.items() if muon and is_inner_matrix(name, parameter)}
    rest = [parameter for name, parameter in parameters.items() if name not in inner]
    chosen: dict[Optimizer, float] = {AdamW(rest, betas=(0.9, 0.99), weight_decay=weight_decay, foreach=True): 1.0}
    if inner:
        chosen[Muon(list(inner.values()), weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")] = muon
    return chosen
