"""The attribute reader: a small network that says what a picture of the miniature's world shows.

It looks at the picture in 16 x 16 cells. Each cell says whether an object's middle lies there, where on the floor that object stands
and what it is; the whole picture says which floor it is. Objects are the local maxima of presence. The relation is not learned: it
follows from the positions. Two objects are read in this order: left before right when they stand side by side, else the nearer before
the farther; so a read relation is always "left of" or "in front of". An object is read reliably while about two thirds of it can be seen
(world.VISIBLE), which holds for every scene that is rendered.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flux_lab.files import replacing
from flux_lab.shapes import shaped
from flux_lab.training.captions import Stated, StatedObject
from flux_lab.training.world import COLORS, FLOORS, INVERSE, MATERIALS, SHAPES, SIZES

CELLS = 16
VALUES = {"shape": SHAPES, "color": COLORS, "size": SIZES, "material": MATERIALS}
PARTS = {"presence": 1, "position": 2} | {name: len(values) for name, values in VALUES.items()}
PRESENT = 0.4  # probability from which a local maximum counts as an object
RARE = -4.0  # logit of presence before training: most cells are empty
MOST = 3  # objects read in one picture; more than two can only be wrong
WEIGHTS_FILE = "reader.safetensors"


class Reading(NamedTuple):
    """Logits of every cell and of the floor. `position` is (x, y) on the floor, in units of the world."""

    presence: Float[Tensor, "batch 1 rows columns"]
    position: Float[Tensor, "batch 2 rows columns"]
    shape: Float[Tensor, "batch shapes rows columns"]
    color: Float[Tensor, "batch colors rows columns"]
    size: Float[Tensor, "batch sizes rows columns"]
    material: Float[Tensor, "batch materials rows columns"]
    floor: Float[Tensor, "batch floors"]


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(hidden_states)))
        return hidden_states + self.conv2(F.silu(self.norm2(hidden)))


class Reader(nn.Module):
    """Two convolutions down to cells of 8 x 8 pixels, residual blocks that look around, one linear map a cell."""

    def __init__(self, channels: tuple[int, int] = (40, 64), dilations: tuple[int, ...] = (1, 2, 1)):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 8, stride=4, padding=2)
        self.norm_in = nn.GroupNorm(8, channels[0])
        self.down = nn.Conv2d(channels[0], channels[1], 4, stride=2, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(channels[1], dilation) for dilation in dilations)
        self.norm_out = nn.GroupNorm(8, channels[1])
        self.cell = nn.Conv2d(channels[1], sum(PARTS.values()), 1)
        nn.init.constant_(self.cell.bias[:1], RARE)
        self.floor = nn.Linear(channels[1], len(FLOORS))

    @shaped
    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Reading:
        """Read pictures with values from -1 to 1."""
        hidden = self.down(F.silu(self.norm_in(self.conv_in(images))))
        for block in self.blocks:
            hidden = block(hidden)
        hidden = F.silu(self.norm_out(hidden))
        parts = self.cell(hidden).split(list(PARTS.values()), dim=1)
        floor = self.floor(reduce(hidden, "batch channels rows columns -> batch channels", "mean"))
        return Reading(**dict(zip(PARTS, parts, strict=True)), floor=floor)


def to_float(images: UInt8[Tensor, "batch height width 3"]) -> Float[Tensor, "batch 3 height width"]:
    return rearrange(images, "batch height width color -> batch color height width").float() / 127.5 - 1


def relate(first: Sequence[float], second: Sequence[float]) -> str:
    """How an object at `first` stands to one at `second`, from their places on the floor."""
    across, away = second[0] - first[0], second[1] - first[1]
    if abs(across) > abs(away):
        return "left of" if across > 0 else "right of"
    return "in front of" if away > 0 else "behind"


def to_stated(objects: list[tuple[StatedObject, list[float]]], floor: str) -> Stated:
    """Objects with their places, in the reading order of this module."""
    relation = None
    if len(objects) == 2:
        relation = relate(objects[0][1], objects[1][1])
        if relation in ("right of", "behind"):
            objects, relation = objects[::-1], INVERSE[relation]
    return Stated(objects=tuple(each for each, _ in objects), relation=relation, floor=floor)


@torch.no_grad()
def read_attributes(reader: Reader, images: UInt8[np.ndarray, "images height width 3"], batch_size: int = 100) -> list[Stated]:
    """What each picture shows, all attributes filled in; an empty table has no objects.

    Raises ValueError for anything but bytes of 128 x 128 pixels.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (8 * CELLS, 8 * CELLS, 3):
        raise ValueError(f"images: expected uint8 [images, {8 * CELLS}, {8 * CELLS}, 3], got {images.dtype} {list(images.shape)}")
    device = next(reader.parameters()).device
    found = []
    for start in range(0, len(images), batch_size):
        pictures = to_float(torch.from_numpy(np.array(images[start : start + batch_size]))).to(device)
        found += read_cells(reader(pictures))
    return found


def read_cells(reading: Reading) -> list[Stated]:
    """The objects at the local maxima of presence."""
    presence = reading.presence.sigmoid()
    peaks = torch.where(F.max_pool2d(presence, 3, stride=1, padding=1) == presence, presence, 0.0)
    height, cells = rearrange(peaks[:, 0], "batch rows columns -> batch (rows columns)").topk(MOST)
    cells = cells.cpu()
    labels = {name: rearrange(getattr(reading, name).argmax(dim=1), "batch rows columns -> batch (rows columns)").cpu() for name in VALUES}
    places = rearrange(reading.position, "batch xy rows columns -> batch (rows columns) xy").cpu()
    scenes = []
    for row, floor in enumerate(reading.floor.argmax(dim=1).tolist()):
        objects = []
        for cell in cells[row][(height[row] > PRESENT).cpu()].tolist():
            values = {name: VALUES[name][int(label[row, cell])] for name, label in labels.items()}
            objects.append((StatedObject(**values), places[row, cell].tolist()))
        scenes.append(to_stated(objects, FLOORS[floor]))
    return scenes


def save_reader(reader: Reader, folder: Path) -> None:
    with replacing(Path(folder) / WEIGHTS_FILE) as file:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in reader.state_dict().items()}, file)


def load_reader(folder: Path) -> Reader:
    """The trained reader of a folder. Raises FileNotFoundError when its stage has not been run."""
    path = Path(folder) / WEIGHTS_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path}: not there; run python -m flux_lab.training.reader first")
    reader = Reader()
    reader.load_state_dict(load_file(path))
    return reader.eval().requires_grad_(False)
