"""Small rooms with boxes and spheres, ray-cast, written in the form of the preprocessed NYUv2.

``python -m examples.scenes.generate --out FOLDER`` writes ``FOLDER/{train,val}``. The targets are
exact: every pixel's ray is intersected with every surface. What a sensor adds is noise in the
image, depth and normals that are missing where a surface is seen at a grazing angle or in a patch,
and patches without a label.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CLASSES = ("floor", "wall", "box", "sphere")
FLOOR, WALL, BOX, SPHERE = range(len(CLASSES))
UP = 1  # the vertical axis; x is to the right, z towards the viewer
FIELD_OF_VIEW = math.radians(60)  # from the left to the right side
GRAZING = 0.1  # cosine between ray and normal below which the depth sensor sees nothing
NOISE = 0.03  # standard deviation of the image's noise, of the range 1

Array = NDArray[np.float64]


class Scene(NamedTuple):
    """One scene: what the four files hold."""

    image: NDArray[np.float32]  # (H, W, 3) in [0, 1]
    label: NDArray[np.int8]  # (H, W), -1 without a label
    depth: NDArray[np.float32]  # (H, W, 1), metres along the optical axis, 0 without a measurement
    normal: NDArray[np.float32]  # (H, W, 3), in the frame of the camera, 0 without a measurement


class Hits(NamedTuple):
    """Where rays meet a surface: the ray's parameter (inf if nowhere) and the outward normal."""

    t: Array  # (P,)
    normal: Array  # (P, 3)


def rays(height: int, width: int) -> Array:
    """Directions of a pinhole camera, ``(H W, 3)``, with z = -1: a ray's parameter is its depth."""
    half = math.tan(FIELD_OF_VIEW / 2)
    x = half * (2 * (np.arange(width) + 0.5) / width - 1)
    y = half * (height - 2 * (np.arange(height) + 0.5)) / width
    x, y = np.meshgrid(x, y)
    return np.stack([x, y, np.full_like(x, -1.0)], axis=-1).reshape(-1, 3)


def turn(angle: float, axis: int) -> Array:
    """The matrix that turns by ``angle`` about an axis."""
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = math.cos(angle)
    matrix[j, i] = math.sin(angle)
    matrix[i, j] = -matrix[j, i]
    return matrix


def hit_room(origin: Array, directions: Array, low: Array, high: Array) -> Hits:
    """Rays from inside a box: where they leave it, with the normals that look inside."""
    with np.errstate(divide="ignore"):
        leave = (np.where(directions > 0, high, low) - origin) / directions
    leave[directions == 0] = np.inf
    axis = leave.argmin(axis=1)
    index = np.arange(len(axis))
    normal = np.zeros_like(directions)
    normal[index, axis] = -np.sign(directions[index, axis])
    return Hits(leave[index, axis], normal)


def hit_box(origin: Array, directions: Array, size: Array) -> Hits:
    """Rays from outside a box that stands about the origin with edges ``size``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        near = (-np.sign(directions) * size / 2 - origin) / directions
        far = (np.sign(directions) * size / 2 - origin) / directions
    inside = np.abs(origin) <= size / 2  # of the slab, for rays parallel to it
    parallel = directions == 0
    near = np.where(parallel, np.where(inside, -np.inf, np.inf), near)
    far = np.where(parallel, np.where(inside, np.inf, -np.inf), far)
    axis = near.argmax(axis=1)
    index = np.arange(len(axis))
    t = near[index, axis]
    t = np.where((t <= far.min(axis=1)) & (t > 0), t, np.inf)
    normal = np.zeros_like(directions)
    normal[index, axis] = -np.sign(directions[index, axis])
    return Hits(t, normal)


def hit_sphere(origin: Array, directions: Array, radius: float) -> Hits:
    """Rays from outside a sphere about the origin."""
    a = (directions**2).sum(axis=1)
    b = directions @ origin
    under = b**2 - a * (origin @ origin - radius**2)
    t = (-b - np.sqrt(np.maximum(under, 0))) / a
    t = np.where((under > 0) & (t > 0), t, np.inf)
    normal = (origin + np.where(np.isfinite(t), t, 0)[:, None] * directions) / radius
    return Hits(t, normal)


def make_scene(rng: np.random.Generator, height: int, width: int) -> Scene:
    """Draw a room, what stands in it and a camera, and look."""
    camera = turn(rng.uniform(-0.7, 0.7), UP) @ turn(-rng.uniform(0.05, 0.35), 0)
    origin = np.array([0.0, rng.uniform(1.2, 1.8), 0.0])
    directions = rays(height, width) @ camera.T
    low = np.array([-rng.uniform(1.5, 4), 0.0, -rng.uniform(3.5, 8)])
    high = np.array([rng.uniform(1.5, 4), rng.uniform(2.3, 3.2), 2.0])
    light = np.array([*rng.uniform(-1.5, 1.5, 1), high[UP] - 0.2, rng.uniform(-3, 0)])

    hits = hit_room(origin, directions, low, high)
    floor = hits.normal[:, UP] > 0
    best, normal = hits.t, hits.normal
    label = np.where(floor, FLOOR, WALL)
    albedo = np.where(floor[:, None], rng.uniform(0.2, 0.9, 3), rng.uniform(0.2, 0.9, 3))
    for kind in rng.choice([BOX, SPHERE], size=rng.integers(3, 8)):
        place = np.array([rng.uniform(low[0], high[0]), 0.0, rng.uniform(low[2], -1.5)])
        if kind == BOX:
            size = rng.uniform(0.3, 1.1, 3)
            place[UP] = size[UP] / 2
            own = turn(rng.uniform(0, math.pi), UP)  # from the box's frame to the room's
            found = hit_box((origin - place) @ own, directions @ own, size)
            found = Hits(found.t, found.normal @ own.T)
        else:
            radius = rng.uniform(0.15, 0.55)
            place[UP] = radius
            found = hit_sphere(origin - place, directions, radius)
        nearer = found.t < best
        best = np.where(nearer, found.t, best)
        normal = np.where(nearer[:, None], found.normal, normal)
        label = np.where(nearer, kind, label)
        albedo = np.where(nearer[:, None], rng.uniform(0.1, 1.0, 3), albedo)

    points = origin + best[:, None] * directions
    image = shade(points, normal, albedo, light, rng)
    image += NOISE * rng.standard_normal(image.shape)
    facing = -(directions * normal).sum(axis=1) / np.linalg.norm(directions, axis=1)
    shape = (height, width)
    missing = (facing < GRAZING).reshape(shape) | patches(rng, shape)
    label = label.reshape(shape)
    label[patches(rng, shape)] = -1
    depth = np.where(missing, 0, best.reshape(shape))
    in_camera = np.where(missing[..., None], 0, (normal @ camera).reshape(*shape, 3))
    return Scene(
        image.clip(0, 1).reshape(*shape, 3).astype(np.float32),
        label.astype(np.int8),
        depth[..., None].astype(np.float32),
        in_camera.astype(np.float32),
    )


def shade(
    points: Array, normal: Array, albedo: Array, light: Array, rng: np.random.Generator
) -> Array:
    """Lambert's law for a lamp, some light from everywhere, and a pattern on every surface."""
    to_light = light - points
    distance = np.linalg.norm(to_light, axis=1)
    lambert = np.maximum((to_light * normal).sum(axis=1) / distance, 0)
    pattern = 1 + 0.15 * np.sign(np.sin(points @ (rng.uniform(4, 12, (3, 3)))).prod(axis=1))
    brightness = 0.25 + 1.2 * lambert / (1 + 0.1 * distance**2)
    return albedo * (pattern * brightness)[:, None]


def patches(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Up to three rectangles of at most a sixth of the height and of the width."""
    covered = np.zeros(shape, dtype=bool)
    for _ in range(rng.integers(0, 4)):
        top, left = (rng.integers(side) for side in shape)
        tall, wide = (rng.integers(1, max(2, side // 6)) for side in shape)
        covered[top : top + tall, left : left + wide] = True
    return covered


def scenes(split: int, count: int, height: int, width: int, seed: int) -> Iterator[Scene]:
    """``count`` scenes; number n depends on the seed, the split and n alone."""
    for index in range(count):
        yield make_scene(np.random.default_rng((seed, split, index)), height, width)


def write(
    out: Path, train: int = 256, val: int = 128, height: int = 96, width: int = 128, seed: int = 0
) -> None:
    """Write ``out/{train,val}/{image,label,depth,normal}/N.npy``.

    Raises:
        FileExistsError: there is something in ``out`` already.
        ValueError: a number of scenes or a size below 1.
    """
    sizes = {"train": train, "val": val, "height": height, "width": width}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"Expected `{name}` to be at least 1 but found {value}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(
            f"Expected {out} to be a new or empty folder but found something there. Give another "
            f"`--out`, or remove it first."
        )
    for split, (name, count) in enumerate((("train", train), ("val", val))):
        folder = out / name
        for kind in Scene._fields:
            (folder / kind).mkdir(parents=True, exist_ok=True)
        for index, scene in enumerate(scenes(split, count, height, width, seed)):
            for kind, array in scene._asdict().items():
                np.save(folder / kind / f"{index}.npy", array)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m examples.scenes.generate", description="Write generated scenes."
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--train", type=int, default=256, help="training scenes (default: 256)")
    parser.add_argument("--val", type=int, default=128, help="scenes to test on (default: 128)")
    parser.add_argument("--height", type=int, default=96, help="of the images (default: 96)")
    parser.add_argument("--width", type=int, default=128, help="of the images (default: 128)")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(arguments))
    try:
        write(**options)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
