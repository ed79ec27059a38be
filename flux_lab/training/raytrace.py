"""Pictures of scenes by analytic ray tracing: each pixel is the mean of 2 x 2 rays.

Arrays keep the three coordinates first, `[3, rays]`, in float32. Light is added up in linear intensity and encoded with a gamma of 2.2.
Only the part of the picture that objects and their shadows can reach is traced; the rest is the floor's empty backdrop.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from flux_lab.training.solids import meet, normals
from flux_lab.training.world import EYE, FOCAL, FORWARD, UP, Scene, SceneObject, outline, project

GAMMA = 2.2
OVERSAMPLING = 2
SUN = np.array([-0.52, -0.42, 0.80], np.float32) / np.float32(math.hypot(-0.52, -0.42, 0.80))
SUN_SPREAD = 0.035  # radius of the sun's disc; one point of it for each of a pixel's rays makes shadows soft
SUN_LIGHT, SKY_LIGHT = 0.72, 0.46
BULGE = 0.30  # polished faces swell a little, so that flat ones show a reflection too
CONTACT = 0.55  # how far the floor next to an object loses the sky's light


def linear(*rgb: float) -> np.ndarray:
    return np.array(rgb, np.float32) ** GAMMA


ALBEDO = {
    "red": linear(0.86, 0.10, 0.10),
    "orange": linear(1.00, 0.52, 0.05),
    "yellow": linear(1.00, 0.88, 0.10),
    "green": linear(0.08, 0.62, 0.18),
    "teal": linear(0.05, 0.74, 0.74),
    "blue": linear(0.13, 0.28, 0.90),
    "purple": linear(0.58, 0.20, 0.78),
    "white": linear(0.95, 0.95, 0.95),
}


@dataclass(frozen=True)
class Surroundings:
    """Linear colours of a floor and of the sky at the horizon and overhead."""

    floor: np.ndarray
    horizon: np.ndarray
    zenith: np.ndarray


SURROUNDINGS = {
    "gray": Surroundings(linear(0.56, 0.56, 0.57), linear(0.84, 0.87, 0.91), linear(0.60, 0.68, 0.79)),
    "wooden": Surroundings(linear(0.62, 0.40, 0.23), linear(0.96, 0.91, 0.81), linear(0.85, 0.75, 0.62)),
    "grassy": Surroundings(linear(0.38, 0.58, 0.24), linear(0.82, 0.92, 0.99), linear(0.33, 0.60, 0.94)),
    "sandy": Surroundings(linear(0.85, 0.74, 0.52), linear(1.00, 0.84, 0.66), linear(0.97, 0.60, 0.42)),
    "dark": Surroundings(linear(0.15, 0.16, 0.20), linear(0.17, 0.18, 0.30), linear(0.04, 0.05, 0.12)),
}


@dataclass(frozen=True)
class Rays:
    """Rays through a picture: directions, distances to the floor (inf in the sky) and a point of the sun's disc for each."""

    direction: np.ndarray
    to_floor: np.ndarray
    sun: np.ndarray


@functools.lru_cache(maxsize=4)
def camera_rays(size: int) -> Rays:
    """All rays of a picture, `[3, size * 2, size * 2]` and `[size * 2, size * 2]`."""
    steps = (np.arange(size * OVERSAMPLING, dtype=np.float32) + 0.5) / (size * OVERSAMPLING) - 0.5
    across, down = np.meshgrid(steps / FOCAL, steps / FOCAL)
    direction = np.stack([across, FORWARD[1] - down * UP[1], FORWARD[2] - down * UP[2]]).astype(np.float32)
    direction /= np.sqrt((direction**2).sum(axis=0))
    to_floor = np.where(direction[2] < -1e-4, EYE[2] / np.maximum(-direction[2], 1e-4), np.inf).astype(np.float32)
    corners = np.indices(across.shape) % OVERSAMPLING * 2.0 - 1.0
    side = np.array([SUN[1], -SUN[0], 0.0]) / math.hypot(SUN[0], SUN[1])
    disc = SUN[:, None, None] + SUN_SPREAD * (corners[0] * side[:, None, None] + corners[1] * np.cross(side, SUN)[:, None, None])
    return Rays(direction, to_floor, disc.astype(np.float32))


def sky(floor: str, rise: np.ndarray) -> np.ndarray:
    """Colour of the sky in directions that rise by `rise`; below the horizon it stays the horizon's."""
    around = SURROUNDINGS[floor]
    share = np.clip(rise / 0.45, 0, 1) ** 0.7
    return around.horizon[:, None] + (around.zenith - around.horizon)[:, None] * share


def haze(distance: np.ndarray) -> np.ndarray:
    """Share of the horizon's colour that covers the floor at a distance: none on the table, all at the horizon."""
    return 1 - np.exp(-((np.maximum(distance - 8.5, 0) / 7.0) ** 1.5))


def floor_albedo(floor: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Colour of the bare floor: a little brighter in the middle, wood in planks."""
    light = 1.06 - 0.012 * np.minimum(x**2 + y**2, 20)
    if floor == "wooden":
        plank = np.floor(x / 0.9 + 0.5)
        light = light * (1 + 0.09 * np.sin(plank * 2.4 + 0.6))
    return SURROUNDINGS[floor].floor[:, None] * light


@functools.lru_cache(maxsize=16)
def backdrop(floor: str, size: int) -> np.ndarray:
    """The empty scene in linear light, `[3, size * 2, size * 2]`."""
    rays = camera_rays(size)
    shape = rays.to_floor.shape
    direction, distance = rays.direction.reshape(3, shape[0] * shape[1]), np.minimum(rays.to_floor, 1e3).reshape(shape[0] * shape[1])
    ground = floor_albedo(floor, direction[0] * distance, EYE[1] + direction[1] * distance)
    share = np.where(np.isfinite(rays.to_floor.reshape(-1)), haze(distance), 1)
    return (ground + (sky(floor, direction[2]) - ground) * share).astype(np.float32).reshape(3, *shape)


def sunlit(items: Sequence[SceneObject], points: np.ndarray, sun: np.ndarray) -> np.ndarray:
    """1 where the way to the sun is free, 0 in a shadow."""
    free = np.ones(points.shape[1], np.float32)
    for item in items:
        free[np.isfinite(meet(item, points, sun))] = 0
    return free


def shade_floor(scene: Scene, color: np.ndarray, points: np.ndarray, distance: np.ndarray, sun: np.ndarray) -> np.ndarray:
    """The backdrop's colour with the objects' shadows, and darker where they keep the sky's light away."""
    sky_part = np.ones_like(distance)
    for item in scene.objects:
        off = np.hypot(points[0] - item.x, points[1] - item.y) / item.half_width
        sky_part *= 1 - CONTACT * np.exp(-((off / 1.15) ** 4))
    sun_part = SUN_LIGHT * SUN[2] / (SUN_LIGHT * SUN[2] + SKY_LIGHT)
    light = sun_part * sunlit(scene.objects, points, sun) + (1 - sun_part) * sky_part
    return color * (light + (1 - light) * haze(distance))


def reflection(floor: str, tint: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """What a polished surface shows in a direction: the sky, tinted, and a bright window beside the sun; the floor hardly at all."""
    rise = direction[2]
    above = np.clip((rise + 0.10) / 0.20, 0, 1)
    along = (direction[0] * SUN[0] + direction[1] * SUN[1]) / math.hypot(SUN[0], SUN[1])
    beside = along / np.maximum(np.sqrt(direction[0] ** 2 + direction[1] ** 2), 1e-6)
    window = np.clip((beside - 0.80) / 0.10, 0, 1) * np.clip((rise + 0.45) / 0.15, 0, 1) * np.clip((0.75 - rise) / 0.15, 0, 1)
    toward = np.clip((direction * SUN[:, None]).sum(axis=0), 0, 1)
    dim = 0.3 * SURROUNDINGS[floor].floor[:, None]
    around = dim + (np.maximum(sky(floor, rise), 0.35) - dim) * above
    return around * (0.35 + 0.65 * tint) + 1.3 * window + 4.0 * toward**60


def shade_object(scene: Scene, item: SceneObject, points: np.ndarray, direction: np.ndarray, sun: np.ndarray) -> np.ndarray:
    """Light that leaves the object's surface towards the camera."""
    shiny = item.material == "shiny"
    normal = normals(item, points, bulge=BULGE if shiny else 0.0)
    others = [other for other in scene.objects if other is not item]
    free = sunlit(others, points, sun)
    facing = np.maximum((normal * SUN[:, None]).sum(axis=0), 0) * free
    open_sky = 0.62 + 0.38 * normal[2]
    albedo = ALBEDO[item.color][:, None]
    body = albedo * (SUN_LIGHT * facing + SKY_LIGHT * 1.15 * open_sky)
    if not shiny:
        return body
    along = (direction * normal).sum(axis=0)
    coat = 0.20 + 0.40 * np.clip(1 + along, 0, 1) ** 4
    return body * (1 - 0.7 * coat) + coat * reflection(scene.floor, albedo / albedo.max(), direction - 2 * along * normal)


def region(scene: Scene, size: int) -> tuple[slice, slice]:
    """Rows and columns, in pixels, that the objects and their shadows can reach."""
    reached = []
    for item in scene.objects:
        points = outline(item)
        reached += points + [(x - z * SUN[0] / SUN[2], y - z * SUN[1] / SUN[2], 0.0) for x, y, z in points]
        wide = 1.6 * item.half_width
        reached += [(item.x + wide * a, item.y + wide * b, 0.0) for a, b in ((-1, -1), (-1, 1), (1, -1), (1, 1))]
    across, down = np.array([project(*point) for point in reached]).T * size
    rows = slice(max(0, math.floor(down.min()) - 2), min(size, math.ceil(down.max()) + 3))
    return rows, slice(max(0, math.floor(across.min()) - 2), min(size, math.ceil(across.max()) + 3))


def trace(scene: Scene, rays: Rays, empty: np.ndarray) -> np.ndarray:
    """Linear colours `[3, rays]` along rays whose colours in the empty scene are `empty`."""
    nearest, owner = rays.to_floor.copy(), np.full(rays.to_floor.shape, -1)
    eye = np.array(EYE, np.float32)[:, None]
    for index, item in enumerate(scene.objects):
        distance = meet(item, eye, rays.direction)
        closer = distance < nearest
        nearest[closer], owner[closer] = distance[closer], index
    color = empty.copy()
    for index in range(-1, len(scene.objects)):
        (chosen,) = np.nonzero((owner == index) & np.isfinite(nearest))
        direction, distance, sun = rays.direction[:, chosen], nearest[chosen], rays.sun[:, chosen]
        points = eye + direction * distance
        if index < 0:
            color[:, chosen] = shade_floor(scene, color[:, chosen], points, distance, sun)
        else:
            color[:, chosen] = shade_object(scene, scene.objects[index], points, direction, sun)
    return color


def encode(color: np.ndarray) -> np.ndarray:
    """Mean of each pixel's rays `[3, rows * 2, columns * 2]` as bytes `[rows, columns, 3]`."""
    blocks = np.minimum(color, 1)
    mean = (blocks[:, 0::2, 0::2] + blocks[:, 1::2, 0::2] + blocks[:, 0::2, 1::2] + blocks[:, 1::2, 1::2]) / 4
    return np.rint(255 * mean ** np.float32(1 / GAMMA)).astype(np.uint8).transpose(1, 2, 0)


@functools.lru_cache(maxsize=16)
def empty_picture(floor: str, size: int) -> np.ndarray:
    return encode(backdrop(floor, size))


def render_scene(scene: Scene, size: int) -> np.ndarray:
    rows, columns = region(scene, size)
    fine = tuple(slice(part.start * OVERSAMPLING, part.stop * OVERSAMPLING) for part in (rows, columns))
    rays = camera_rays(size)
    parts = [array[..., *fine] for array in (rays.direction, rays.to_floor, rays.sun, backdrop(scene.floor, size))]
    high, wide = parts[1].shape
    direction, to_floor, sun, empty = (array.reshape(*array.shape[:-2], high * wide) for array in parts)
    color = trace(scene, Rays(direction, to_floor, sun), empty)
    picture = empty_picture(scene.floor, size).copy()
    picture[rows, columns] = encode(color.reshape(3, high, wide))
    return picture


def render(scenes: Sequence[Scene], size: int = 128) -> UInt8[np.ndarray, "scenes size size 3"]:
    """Pictures of scenes, `size` pixels square."""
    return np.stack([render_scene(scene, size) for scene in scenes])
