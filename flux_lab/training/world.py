"""The miniature's world: one or two solids on a table top, seen by one fixed camera.

World axes are x to the right, y away from the camera, z up; lengths are in units of a large sphere's radius. Picture coordinates run
from (0, 0), the upper left corner, to (1, 1).
"""

import dataclasses
import hashlib
import math
from dataclasses import dataclass

import numpy as np

SHAPES = ("sphere", "cube", "cylinder", "cone")
COLORS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "white")
SIZES = ("small", "large")
MATERIALS = ("matte", "shiny")
FLOORS = ("gray", "wooden", "grassy", "sandy", "dark")
RELATIONS = ("left of", "right of", "in front of", "behind")
INVERSE = {"left of": "right of", "right of": "left of", "in front of": "behind", "behind": "in front of"}

RADIUS = {"small": 0.62, "large": 1.0}
HALF_WIDTH = {"sphere": 1.0, "cube": 0.80, "cylinder": 0.78, "cone": 0.98}  # in radii; a cube's is half its edge
HEIGHT = {"sphere": 2.0, "cube": 1.60, "cylinder": 1.75, "cone": 2.0}  # in radii

EYE = (0.0, -6.6, 3.1)
TARGET = (0.0, 0.0, 0.9)
FOCAL = 1.12  # distance of the picture plane, in picture widths
FLAT = math.hypot(TARGET[1] - EYE[1], TARGET[2] - EYE[2])
FORWARD = (0.0, (TARGET[1] - EYE[1]) / FLAT, (TARGET[2] - EYE[2]) / FLAT)
UP = (0.0, -FORWARD[2], FORWARD[1])

MARGIN = 0.03  # objects keep this far from the picture's border
GAP = 0.03  # between the boxes of two objects that stand side by side
VISIBLE = 0.68  # of the box of the object behind
SINGLE = 0.35  # share of scenes with one object
HELD_OUT = 5  # one combination in so many is kept from training
TRIES = 500


@dataclass(frozen=True)
class SceneObject:
    """A solid standing on the floor at (x, y); `turn` is a cube's angle about the vertical in radians."""

    shape: str
    color: str
    size: str
    material: str
    x: float = 0.0
    y: float = 0.0
    turn: float = 0.0

    @property
    def half_width(self) -> float:
        return HALF_WIDTH[self.shape] * RADIUS[self.size]

    @property
    def height(self) -> float:
        return HEIGHT[self.shape] * RADIUS[self.size]

    @property
    def reach(self) -> float:
        """Radius of the smallest upright cylinder that holds the solid."""
        return self.half_width * (math.sqrt(2) if self.shape == "cube" else 1.0)


@dataclass(frozen=True)
class Scene:
    """One or two objects on a floor; with two, the first is `relation` the second ("left of", ...)."""

    objects: tuple[SceneObject, ...]
    floor: str
    relation: str | None = None

    def to_dict(self) -> dict:
        return dataclasses.asdict(self) | {"objects": [dataclasses.asdict(each) for each in self.objects]}

    @classmethod
    def from_dict(cls, values: dict) -> "Scene":
        objects = tuple(SceneObject(**each) for each in values["objects"])
        return cls(objects=objects, floor=values["floor"], relation=values["relation"])

    def swapped(self) -> "Scene":
        """The same picture with its two objects named in the other order."""
        return dataclasses.replace(self, objects=self.objects[::-1], relation=INVERSE[self.relation])


def project(x: float, y: float, z: float) -> tuple[float, float]:
    """Picture coordinates of a point of the world."""
    dy, dz = y - EYE[1], z - EYE[2]
    depth = dy * FORWARD[1] + dz * FORWARD[2]
    return 0.5 + FOCAL * (x - EYE[0]) / depth, 0.5 - FOCAL * (dy * UP[1] + dz * UP[2]) / depth


def outline(item: SceneObject) -> list[tuple[float, float, float]]:
    """Points of the world whose picture spans the object's."""
    width, height = item.half_width, item.height
    if item.shape == "sphere":
        sides = [(math.cos(a) * width * 1.02, math.sin(a) * width * 1.02) for a in np.arange(8) * math.pi / 4]
        return [(item.x + a, item.y + b * UP[1], width + b * UP[2]) for a, b in sides]
    turn, corners = (item.turn + math.pi / 4, 4) if item.shape == "cube" else (0.0, 12)
    angles = turn + np.arange(corners) * 2 * math.pi / corners
    ring = [(item.x + item.reach * math.cos(a), item.y + item.reach * math.sin(a)) for a in angles]
    top = [(item.x, item.y)] if item.shape == "cone" else ring
    return [(x, y, 0.0) for x, y in ring] + [(x, y, height) for x, y in top]


def box(item: SceneObject) -> tuple[float, float, float, float]:
    """The object's bounding box in the picture: left, upper, right, lower."""
    across, down = zip(*(project(*point) for point in outline(item)), strict=True)
    return min(across), min(down), max(across), max(down)


def visible_share(behind: SceneObject, front: SceneObject) -> float:
    """Share of the rear object's box that the front object's box leaves free."""
    a, b = box(behind), box(front)
    covered = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return 1.0 - covered / ((a[2] - a[0]) * (a[3] - a[1]))


def inside(item: SceneObject) -> bool:
    left, upper, right, lower = box(item)
    return left > MARGIN and upper > MARGIN and right < 1 - MARGIN and lower < 1 - MARGIN


def clear(first: SceneObject, second: SceneObject, relation: str) -> bool:
    """Whether both are whole in the picture, apart, recognisable, and their relation can be told at a glance."""
    if not (inside(first) and inside(second)):
        return False
    if relation == "left of":
        return box(second)[0] - box(first)[2] > GAP
    apart = math.hypot(first.x - second.x, first.y - second.y) > first.reach + second.reach + 0.05
    return apart and visible_share(second, first) > VISIBLE


def place_pair(first: SceneObject, second: SceneObject, relation: str, rng: np.random.Generator) -> tuple[SceneObject, ...]:
    """Give both objects positions that satisfy `relation`; raises RuntimeError where none is found."""
    if relation in ("right of", "behind"):
        return place_pair(second, first, INVERSE[relation], rng)[::-1]
    for _ in range(TRIES):
        along, across = rng.uniform(1.5, 3.6), rng.uniform(-0.5, 0.5)
        dx, dy = (along, across) if relation == "left of" else (across * along, along * 0.85)
        x, y = rng.uniform(-0.9, 0.9), rng.uniform(-0.8, 0.8)
        one = dataclasses.replace(first, x=x - dx / 2, y=y - dy / 2)
        two = dataclasses.replace(second, x=x + dx / 2, y=y + dy / 2)
        if clear(one, two, relation):
            return one, two
    raise RuntimeError(f"no clear place found for {first} {relation} {second}")


def place_single(item: SceneObject, rng: np.random.Generator) -> SceneObject:
    for _ in range(TRIES):
        placed = dataclasses.replace(item, x=rng.uniform(-2.4, 2.4), y=rng.uniform(-1.1, 1.1))
        if inside(placed):
            return placed
    raise RuntimeError(f"no place found for {item}")


def sample_object(rng: np.random.Generator) -> SceneObject:
    shape, color, size, material = (str(rng.choice(values)) for values in (SHAPES, COLORS, SIZES, MATERIALS))
    turn = float(rng.uniform(0, math.pi / 2)) if shape == "cube" else 0.0
    return SceneObject(shape=shape, color=color, size=size, material=material, turn=turn)


def sample_scene(rng: np.random.Generator, count: int | None = None) -> Scene:
    """A random scene of `count` objects (one or two by chance when None); two objects differ in colour or shape."""
    floor = str(rng.choice(FLOORS))
    if count == 1 or (count is None and rng.random() < SINGLE):
        return Scene(objects=(place_single(sample_object(rng), rng),), floor=floor)
    relation = str(rng.choice(RELATIONS))
    while True:
        first, second = sample_object(rng), sample_object(rng)
        if (first.color, first.shape) != (second.color, second.shape):
            return Scene(objects=place_pair(first, second, relation, rng), floor=floor, relation=relation)


def combination(scene: Scene) -> str | None:
    """What binds two objects: colours, shapes and relation, the same for "A left of B" and "B right of A"; None for one object."""
    if scene.relation is None:
        return None
    named = scene if scene.relation in ("left of", "in front of") else scene.swapped()
    first, second = (f"{each.color} {each.shape}" for each in named.objects)
    return f"{first} {named.relation} {second}"


def held_out(scene: Scene) -> bool:
    """Whether the scene's combination is kept from training: one in five by SHA-256, the same on every machine."""
    key = combination(scene)
    return key is not None and int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) % HELD_OUT == 0
