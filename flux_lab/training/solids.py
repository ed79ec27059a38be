"""Where rays meet the four solids, and the surface's direction there.

Arrays keep the three coordinates first, `[3, rays]`, in float32.
"""

import math

import numpy as np

from flux_lab.training.world import SceneObject

NEAR = 1e-3  # a ray that starts on a surface does not meet it again


def to_local(item: SceneObject, vectors: np.ndarray, moved: bool) -> np.ndarray:
    """Vectors in the object's own axes; points (`moved`) count from the middle of its base."""
    x, y, z = vectors
    if moved:
        x, y = x - item.x, y - item.y
    if item.turn:
        cos, sin = math.cos(item.turn), math.sin(item.turn)
        x, y = x * cos + y * sin, y * cos - x * sin
    return np.stack([x, y, z])


def first_root(a: np.ndarray, half_b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both solutions of a t^2 + 2 half_b t + c = 0, smaller first, inf where there is none; `a` is positive."""
    square = half_b**2 - a * c
    root = np.sqrt(np.maximum(square, 0))
    return np.where(square > 0, (-half_b - root) / a, np.inf), np.where(square > 0, (-half_b + root) / a, np.inf)


def meet_sphere(item: SceneObject, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    radius = item.half_width
    x, y, z = origin[0], origin[1], origin[2] - radius
    u, v, w = direction
    return first_root(u * u + v * v + w * w, x * u + y * v + z * w, x * x + y * y + z * z - radius**2)[0]


def meet_cube(item: SceneObject, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    half = item.half_width
    centre = np.array([0, 0, half], np.float32)[:, None]
    inverse = 1 / np.where(np.abs(direction) < 1e-6, np.float32(1e-6), direction)
    middle, spread = (centre - origin) * inverse, half * np.abs(inverse)
    enter, leave = (middle - spread).max(axis=0), (middle + spread).min(axis=0)
    return np.where(leave > enter, enter, np.inf)


def meet_cylinder(item: SceneObject, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Side or lid: the base rests on the floor and is never met from outside."""
    (x, y, z), (u, v, w) = origin, direction
    side = first_root(u * u + v * v, x * u + y * v, x * x + y * y - item.half_width**2)[0]
    level = z + np.where(np.isfinite(side), side, 0) * w
    side = np.where((level >= 0) & (level <= item.height), side, np.inf)
    lid = (item.height - z) / np.where(np.abs(w) < 1e-6, np.float32(1e-6), w)
    inside = (x + lid * u) ** 2 + (y + lid * v) ** 2 <= item.half_width**2
    return np.minimum(side, np.where(inside & (lid > 0), lid, np.inf))


def meet_cone(item: SceneObject, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    (x, y, z), (u, v, w) = origin, direction
    slope = (item.half_width / item.height) ** 2
    fall = z - item.height
    roots = first_root(
        np.maximum(u * u + v * v - slope * w * w, 1e-6), x * u + y * v - slope * fall * w, x * x + y * y - slope * fall * fall
    )
    found = np.full(np.broadcast(x, u).shape, np.inf, np.float32)
    for root in roots:
        level = z + np.where(np.isfinite(root), root, 0) * w
        found = np.minimum(found, np.where((level >= 0) & (level <= item.height) & (root > 0), root, np.inf))
    return found


MEET = {"sphere": meet_sphere, "cube": meet_cube, "cylinder": meet_cylinder, "cone": meet_cone}


def meet(item: SceneObject, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Distance along each ray to the object, inf where it is missed."""
    distance = MEET[item.shape](item, to_local(item, origin, moved=True), to_local(item, direction, moved=False))
    return np.where(distance > NEAR, distance, np.inf)


def normals(item: SceneObject, points: np.ndarray, bulge: float = 0.0) -> np.ndarray:
    """Outward unit normals at points of the surface; edges are slightly rounded, so that they catch the light.

    `bulge` bends the normals of flat and straight faces outwards, as if they swelled.
    """
    x, y, z = to_local(item, points, moved=True)
    width, height = item.half_width, item.height
    upward = 2 * z / height - 1
    if item.shape == "sphere":
        local = np.stack([x, y, z - width])
    elif item.shape == "cube":
        inner = np.stack([x, y, z - width]) / width
        local = np.sign(inner) * np.clip((np.abs(inner) - 0.86) / 0.14, 0, 1) ** 3 + bulge * inner
    elif item.shape == "cylinder":
        out = np.sqrt(x * x + y * y) / width
        rim = np.clip((out - 0.88) / 0.12, 0, 1) ** 3 / np.maximum(out, 1e-6) + bulge
        local = np.stack([x / width * rim, y / width * rim, np.clip((z / height - 0.92) / 0.08, 0, 1) ** 3 + bulge * upward])
    else:
        out = np.maximum(np.sqrt(x * x + y * y), 1e-6) * math.hypot(width, height)
        local = np.stack([x / out * height, y / out * height, width / math.hypot(width, height) + bulge * upward])
    local /= np.maximum(np.sqrt((local**2).sum(axis=0)), 1e-6)
    cos, sin = math.cos(item.turn), math.sin(item.turn)
    return np.stack([local[0] * cos - local[1] * sin, local[0] * sin + local[1] * cos, local[2]])
