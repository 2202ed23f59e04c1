"""Draw the pictures of ``docs/rooms.md`` into ``docs/images``: ``python docs/rooms_images.py [NAME ...]``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import hsv_to_rgb
from PIL import Image, ImageDraw

from geossl.data.simulate import Room, View, ViewOptions, build_room, radiance_grid, sample_pair, sample_view, sample_views, sense
from geossl.geometry import BOX_EDGES, Cameras, box_corners, intrinsics_from_fov, look_at, pixel_centers, project

FOLDER = Path(__file__).parent / "images"
WIDE = ViewOptions(width=320, height=240)


def pixels(image: torch.Tensor | np.ndarray) -> np.ndarray:
    """Return ``[H, W, 3]`` uint8 of values in 0..1."""
    return (np.clip(np.asarray(image), 0, 1) * 255).round().astype(np.uint8)


def sheet(rows: list[list[np.ndarray]], name: str, exact: bool = False) -> None:
    """Write pictures of one size as rows of a sheet."""
    height, width = rows[0][0].shape[:2]
    made = Image.new("RGB", (max(map(len, rows)) * (width + 4) + 4, len(rows) * (height + 4) + 4), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            made.paste(Image.fromarray(picture), (4 + j * (width + 4), 4 + i * (height + 4)))
    FOLDER.mkdir(exist_ok=True)
    if not exact:  # a third of the size, and hardly seen
        made = made.quantize(palette=made.quantize(256), dither=Image.Dither.FLOYDSTEINBERG)
    made.save(FOLDER / f"{name}.png", optimize=True)


def depth_picture(view: View, far: float = 6.0) -> np.ndarray:
    """Return depth in colours, black where it is not known."""
    shown = colormaps["turbo"](1 - np.clip(view.depth.numpy() / far, 0, 1))[..., :3]
    return pixels(shown * (view.depth > 0).numpy()[..., None])


def instance_picture(view: View) -> np.ndarray:
    """Return every object in its own colour, the room in grey, unsure pixels in white."""
    table = np.concatenate([[[0.8] * 3], colormaps["tab20"](np.arange(20))[:, :3]])
    shown = table[np.where(view.instance > 0, (view.instance - 1) % 20 + 1, 0)]
    return pixels(np.where(view.valid.numpy()[..., None], shown, 1.0))


def box_picture(room: Room, view: View) -> np.ndarray:
    """Return the picture with the boxes of the objects it shows and their classes."""
    image = Image.fromarray(pixels(view.rgb))
    draw = ImageDraw.Draw(image)
    corners = box_corners(room.boxes)
    place, depth = project(corners.flatten(0, 1), view.camera.world_to_cam, view.camera.intrinsics)
    place, depth = place.view(-1, 8, 2), depth.view(-1, 8)
    for number in (room.visible_counts(view) > 40).nonzero()[:, 0].tolist():
        if float(depth[number].min()) < 0.1:
            continue
        color = tuple(int(255 * c) for c in colormaps["tab20"](number % 20)[:3])
        for a, b in BOX_EDGES:
            draw.line([tuple(place[number, a].tolist()), tuple(place[number, b].tolist())], fill=color, width=2)
        top = place[number][place[number, :, 1].argmin()].tolist()
        draw.text((top[0] + 2, top[1] - 11), room.classes[int(room.labels[number])], fill=color)
    return np.asarray(image)


def flow_picture(flow: torch.Tensor, seen: torch.Tensor) -> np.ndarray:
    """Return flow as hue (direction) and saturation (length), white where the other view does not show the place."""
    x, y = flow.numpy()[..., 0], flow.numpy()[..., 1]
    length = np.hypot(x, y)
    hue = (np.arctan2(y, x) / (2 * np.pi)) % 1
    scale = np.quantile(length[seen.numpy()], 0.98) if bool(seen.any()) else 1.0
    shown = hsv_to_rgb(np.stack([hue, np.clip(length / max(float(scale), 1e-6), 0, 1), np.ones_like(hue)], -1))
    return pixels(np.where(seen.numpy()[..., None], shown, 1.0))


def rooms() -> None:
    """Twenty-four rooms."""
    tiles = []
    for number in range(24):
        room = build_room(0, number)
        tiles.append(pixels(sample_view(room, room.rng(0), ViewOptions(width=192, height=192)).rgb))
    sheet([tiles[i : i + 6] for i in range(0, 24, 6)], "rooms", exact=True)


def views() -> None:
    """One room: images, depth, instances, boxes."""
    room = build_room(0, 21)
    seen = sample_views(room, 3, room.rng(0), WIDE)
    sheet(
        [
            [pixels(v.rgb) for v in seen], [depth_picture(v) for v in seen], [instance_picture(v) for v in seen],
            [box_picture(room, v) for v in seen],
        ],
        "rooms_views",
    )  # fmt: skip


def pair() -> None:
    """Pairs: both views, flow, and the second view warped onto the first."""
    rows = []
    for number in (21, 7, 3):
        room = build_room(0, number)
        found = sample_pair(room, room.rng(1), WIDE)
        height, width = found.first.depth.shape
        place = (pixel_centers(height, width) + found.flow) / torch.tensor([width, height]) * 2 - 1
        warped = torch.nn.functional.grid_sample(found.second.rgb.permute(2, 0, 1)[None], place[None], align_corners=False)[0].permute(
            1, 2, 0
        )
        rows.append(
            [
                pixels(found.first.rgb), pixels(found.second.rgb), flow_picture(found.flow, found.covisible),
                pixels(torch.where(found.covisible[..., None], warped, torch.ones(()))),
            ]
        )  # fmt: skip
    sheet(rows, "rooms_pairs")


def dollhouse(room: Room, width: int = 320, height: int = 240) -> np.ndarray:
    """Look into a room from above: walls and ceiling are only seen from inside."""
    w, d, _ = room.plan.size
    target = torch.tensor([w / 2, d / 2, 0.5])
    eye = target + torch.tensor([0.45 * w, -1.05 * d, 1.1 * max(w, d)])
    camera = Cameras(look_at(eye, target), intrinsics_from_fov(48.0, width, height), width, height)
    view = room.render(camera)
    return pixels(torch.where((view.instance >= 0)[..., None], view.rgb, torch.ones(())))


def above() -> None:
    """One room of each kind from above."""
    numbers = (6, 23, 13, 5, 21, 4, 14, 22)
    tiles = [dollhouse(build_room(0, number)) for number in numbers]
    sheet([tiles[:4], tiles[4:]], "rooms_above")


def sensor() -> None:
    """A clean and a noisy view, and a slice of the radiance grid."""
    room = build_room(0, 21)
    clean = sample_view(room, room.rng(0), WIDE)
    noisy = sense(clean, np.random.default_rng(0))
    grid = radiance_grid(room, 160, "alpha").rgbsigma
    level = [grid[:, :, z, :3] * grid[:, :, z, 3:] + 1 - grid[:, :, z, 3:] for z in (int(0.45 / 5.4 * 160), int(1.0 / 5.4 * 160))]
    slices = [np.asarray(Image.fromarray(pixels(s.transpose(1, 0, 2)[::-1])).resize((320, 240), Image.Resampling.NEAREST)) for s in level]
    sheet([[pixels(clean.rgb), pixels(noisy.rgb), depth_picture(noisy)], [*slices, box_picture(room, clean)]], "rooms_sensor")


PICTURES: dict[str, Callable[[], None]] = {"rooms": rooms, "views": views, "pair": pair, "above": above, "sensor": sensor}

if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        PICTURES[name]()
