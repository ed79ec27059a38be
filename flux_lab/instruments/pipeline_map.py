"""The map of the whole pipeline: what every lesson opens with, its own stage lit."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from flux_lab.instruments.anatomy import FLUX_1_DEV, MINIATURE, Anatomy
from flux_lab.instruments.style import BLUE, DPI, FAINT, INK, LIT, PALE, PAPER, VERMILLION, WIDTH

HEIGHT = 5.6
ACROSS, DOWN = 100, 56  # the map's own coordinates
LINE = 2.1  # between two lines of shapes
SHAPE_COLORS = (BLUE, VERMILLION)


@dataclass(frozen=True)
class Box:
    """A part of the pipeline: its middle, its size, what is written in it, and the number of the lesson that opens it."""

    x: float
    y: float
    width: float
    height: float
    label: str
    lesson: str = ""


@dataclass(frozen=True)
class Arrow:
    """A tensor on its way from one box to another. `label` names it, `tensor` is its key in `Anatomy.shapes`; both stand at `at`."""

    start: tuple[float, float]
    end: tuple[float, float]
    boxes: tuple[str, str]
    label: str = ""
    tensor: str = ""
    at: tuple[float, float] | None = None


BOXES = {
    "prompt": Box(6, 47, 10, 4.5, "prompt"),
    "prompt_2": Box(6, 34, 10, 4.5, "prompt_2"),
    "seed": Box(6, 22, 10, 4.5, "seed"),
    "tokenizer": Box(24, 47, 14, 6.5, "CLIP tokenizer", "01"),
    "tokenizer_2": Box(24, 34, 14, 6.5, "T5 tokenizer", "01"),
    "pack": Box(24, 22, 14, 6.5, "noise, packed", "03"),
    "text_encoder": Box(47, 47, 14, 6.5, "CLIP encoder", "02"),
    "text_encoder_2": Box(47, 34, 14, 6.5, "T5 encoder", "02"),
    "transformer": Box(83, 35, 30, 32, "", ""),
    "conditioning": Box(83, 47, 26, 5, "conditioning", "05"),
    "rope": Box(83, 40.5, 26, 5, "positions (RoPE)", "04"),
    "double": Box(83, 34, 26, 5, "19 double-stream blocks", "06"),
    "single": Box(83, 27.5, 26, 5, "38 single-stream blocks", "07"),
    "scheduler": Box(84, 7, 22, 6.5, "scheduler: one step", "09"),
    "unpack": Box(55, 7, 10, 6.5, "unpack", "03"),
    "vae": Box(30, 7, 13, 6.5, "VAE decoder", "11"),
    "image": Box(6, 7, 10, 4.5, "image"),
}
ARROWS = (
    Arrow((11, 47), (17, 47), ("prompt", "tokenizer")),
    Arrow((11, 34), (17, 34), ("prompt_2", "tokenizer_2")),
    Arrow((11, 22), (17, 22), ("seed", "pack")),
    Arrow((31, 47), (40, 47), ("tokenizer", "text_encoder"), "ids", "clip_ids"),
    Arrow((31, 34), (40, 34), ("tokenizer_2", "text_encoder_2"), "ids", "t5_ids"),
    Arrow((54, 47), (70, 47), ("text_encoder", "conditioning"), "pooled", "pooled_prompt_embeds", (61, 47)),
    Arrow((54, 34), (70, 34), ("text_encoder_2", "double"), "prompt_embeds", "prompt_embeds", (61, 34)),
    Arrow((31, 22), (68, 22), ("pack", "transformer"), "tokens", "tokens"),
    Arrow((94, 19), (94, 10.25), ("transformer", "scheduler"), "velocity", "velocity", (87.5, 15.2)),
    Arrow((76, 10.25), (76, 19), ("scheduler", "transformer"), "next tokens", "", (69.5, 14.4)),
    Arrow((73, 7), (60, 7), ("scheduler", "unpack"), "tokens", "tokens"),
    Arrow((50, 7), (36.5, 7), ("unpack", "vae"), "latents", "latents"),
    Arrow((23.5, 7), (11, 7), ("vae", "image"), "pixels", "image"),
)
# The lessons' stems, without their numbers -> what of the map they are about.
STAGES = {
    "tokenization": ("tokenizer", "tokenizer_2"),
    "text_encoders": ("text_encoder", "text_encoder_2"),
    "latents_and_packing": ("pack", "unpack"),
    "rope": ("rope",),
    "conditioning_and_adaln": ("conditioning",),
    "double_stream_blocks": ("double",),
    "single_stream_blocks": ("single",),
    "transformer": ("transformer", "conditioning", "rope", "double", "single"),
    "sigma_schedule": ("scheduler",),
    "denoising_loop": ("transformer", "scheduler"),
    "vae": ("vae",),
    "flux_in_16_gb": ("text_encoder", "text_encoder_2", "transformer", "conditioning", "rope", "double", "single", "vae"),
}


def pipeline_map(stage: str | None = None, shapes: Sequence[Anatomy] = (MINIATURE, FLUX_1_DEV)) -> Figure:
    """Draw the pipeline. `stage`, a key of `STAGES`, is lit and the rest stands back; the shapes on the arrows are those of `shapes`.

    Raises ValueError for an unknown stage and for more than two sets of shapes.
    """
    if stage is not None and stage not in STAGES:
        raise ValueError(f"stage: expected None or one of {list(STAGES)}, got {stage!r}")
    if not 1 <= len(shapes) <= len(SHAPE_COLORS):
        raise ValueError(f"shapes: expected one or two anatomies, got {len(shapes)}")
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, ACROSS), ylim=(0, DOWN))
    axes.set_axis_off()
    lit = set(STAGES[stage]) if stage else set()
    for name, box in BOXES.items():
        _draw_box(axes, name, box, name in lit)
    for arrow in ARROWS:
        _draw_arrow(axes, arrow, shapes, faint=bool(stage) and not lit & set(arrow.boxes))
    _draw_notes(axes, shapes)
    return figure


def _draw_box(axes: Axes, name: str, box: Box, lit: bool) -> None:
    is_frame, is_end = name == "transformer", not box.lesson
    fill = PAPER if is_end else LIT if lit else PALE
    style = {"facecolor": fill, "edgecolor": INK, "linewidth": 2.2 if lit else 0.9, "zorder": 1 if is_frame else 3}
    corner = (box.x - box.width / 2, box.y - box.height / 2)
    axes.add_patch(FancyBboxPatch(corner, box.width, box.height, boxstyle="round,pad=0,rounding_size=1", **style))
    text = {"ha": "center", "va": "center", "color": INK, "zorder": 4}
    axes.text(box.x, box.y + (0.9 if box.lesson else 0), box.label, fontsize=9.5, weight="bold" if lit else "normal", **text)
    if box.lesson:
        axes.text(box.x, box.y - 1.4, f"lesson {box.lesson}", fontsize=7.5, **text)


def _draw_arrow(axes: Axes, arrow: Arrow, shapes: Sequence[Anatomy], faint: bool) -> None:
    color = FAINT if faint else INK
    axes.add_patch(FancyArrowPatch(arrow.start, arrow.end, arrowstyle="-|>", mutation_scale=11, color=color, linewidth=1.3, zorder=2))
    x, y = arrow.at or ((arrow.start[0] + arrow.end[0]) / 2, arrow.start[1])
    axes.text(x, y + 0.7, arrow.label, ha="center", va="bottom", fontsize=8.5, style="italic", color=color)
    for line, (anatomy, own) in enumerate(zip(shapes, SHAPE_COLORS, strict=False)):
        if arrow.tensor:
            shape = str(list(anatomy.shapes()[arrow.tensor]))
            below = y - 0.8 - LINE * line
            axes.text(x, below, shape, ha="center", va="top", fontsize=8.5, color=FAINT if faint else own)


def _draw_notes(axes: Axes, shapes: Sequence[Anatomy]) -> None:
    """What the colours mean, the name of the frame, and what else goes into it."""
    axes.text(83, 22.6, "transformer (lesson 08)", ha="center", va="center", fontsize=9.5, color=INK)
    axes.text(83, 53.3, "in every step also: the noise level σ, the guidance scale", ha="center", va="center", fontsize=8, color=INK)
    axes.text(69.5, 13.4, "the loop (lesson 10)", ha="center", va="center", fontsize=8, color=INK)
    axes.text(1, 54, "shapes:", ha="left", va="center", fontsize=9, color=INK)
    for place, (anatomy, color) in enumerate(zip(shapes, SHAPE_COLORS, strict=False)):
        pixels = anatomy.vae.sample_size
        name = f"{anatomy.name}, {pixels} x {pixels} pixels"
        axes.text(8.5 + 25 * place, 54, name, ha="left", va="center", fontsize=9, weight="bold", color=color)
