"""FLUX.1, taken apart: every component reimplemented, in the order in which the data flows.

Axis glossary. These names are used in every annotation, figure and table:

    batch             prompts x images per prompt
    length            text tokens (77 for CLIP; 512, 256 or fewer for T5)
    tokens            image tokens: rows * columns of 2x2 latent patches
    sequence          text tokens followed by image tokens
    channels          channels of a feature map; of latents: 16
    patch_channels    channels of one packed token: channels * 2 * 2 = 64
    height width      pixels of an image, or rows and columns of latents
    rows columns      rows and columns of 2x2 patches: height / 2, width / 2 of the latents
    dim               width of a residual stream: heads * head_dim
    heads head_dim    attention heads and the width of one
    axes              the three numbers of a position id: (unused, row, column)
    pooled_dim        width of CLIP's pooled vector
    joint_dim         width of T5's token vectors
    steps             denoising steps
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from flux_lab.pipeline import FluxPipeline

_LAZY = {"FluxPipeline": "flux_lab.pipeline", "load_mini": "flux_lab.pipeline"}
__all__ = ["FluxPipeline", "__version__", "data_dir", "load_mini"]


def data_dir() -> Path:
    """The folder of the bundled data: inside the installed package, or `data/` of the repository.

    Raises FileNotFoundError when neither is there.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "data", package.parent / "data"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"the bundled data is missing: looked for {package / 'data'} and {package.parent / 'data'}")


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    try:
        return import_module(f"flux_lab.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"flux_lab.{name}":
            raise
        raise AttributeError(f"module 'flux_lab' has no attribute {name!r}") from None
