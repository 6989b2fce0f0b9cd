"""Boxes for photos, and pictures of them.

found = Localizer("runs/CUB_vgg16_bridge")("photo.jpg")
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, make_grid

from . import cam, utils
from .boxes import LEVELS, fixed_level, iou_matrix, level_boxes, scale_boxes
from .data import Split, open_rgb, to_input
from .evaluation import MapBatch, TrainedRun, require_threshold
from .losses import full_precision
from .utils import InputError

# A fraction of the map's maximum, where val chose no threshold: the value of CAM (CVPR 2016).
FALLBACK_THRESHOLD = 0.2


class Found(NamedTuple):
    """What `Localizer` found in an image."""

    box: list[int] | None  # x0, y0, x1, y1, in pixels of the image as shown, corners inside; None: empty map
    top5: list[dict[str, Any]]  # "class" from 0, "name" where known, "probability"; the best first
    # Of the Top-1 class, float32 in [0, 1], at the run's image_size (224 x 224): stretch it over the image.
    score_map: np.ndarray

    def __repr__(self) -> str:
        """The best class with its probability, and the box; without the array, for notebooks."""
        best, box = self.top5[0], "none" if self.box is None else ",".join(map(str, self.box))
        return f"class {best.get('name', best['class'])} ({100 * best['probability']:.1f} %), box {box}"


class Localizer:
    """A trained run, for images of one's own: box of the Top-1 class, five best classes, score map.

    The box is the largest contour at `threshold`, in [0, 1). A threshold that you pass is a fraction of the
    map's maximum. The default is the one chosen on val for this normalization, a fraction of [0, 1]
    (`Chosen.for_photos`); without it FALLBACK_THRESHOLD of the maximum, and `note` tells why.

    run: a folder that train.py wrote. checkpoint: "best" or "last". normalize, percentile: as in
    `TrainedRun.choose`. device, amp, data_root, lists, batch_size, workers: as of `TrainedRun`; the last four
    are for val, which is evaluated where the thresholds of the training do not hold. Raises InputError as
    `TrainedRun` does.
    """

    def __init__(
        self,
        run: str | Path,
        device: str = "auto",
        *,
        checkpoint: str = "best",
        normalize: str = "minmax",
        percentile: float | str | None = None,
        threshold: float | None = None,
        amp: str | None = None,
        data_root: str | Path | None = None,
        lists: str | Path | None = None,
        batch_size: int = 32,
        workers: int = 0,
    ):
        require_threshold(threshold)
        where = dict(data_root=data_root, lists=lists, batch_size=batch_size, workers=workers)
        self.run = TrainedRun(run, checkpoint, device, amp=amp, **where)
        self.how, self.threshold, self.level, self.note = (normalize, percentile), threshold, None, ""
        if threshold is None or percentile == "val":
            chosen = self.run.choose(normalize, percentile)
            self.how = normalize, chosen.percentile
        if threshold is None:
            self.level, self.note = chosen.for_photos()
            self.threshold = FALLBACK_THRESHOLD if self.level is None else self.level / LEVELS

    def __call__(self, images: Any) -> Found | list[Found]:
        """A path, PIL image, or array or tensor H x W x 3 uint8 (RGB) -> Found; a list of them -> a list.

        The EXIF orientation of a path or PIL image is applied. Raises InputError for an image that cannot be
        read, and for anything else.
        """
        if isinstance(images, (list, tuple)):
            return [self._localize(image) for image in images]
        return self._localize(images)

    @torch.inference_mode()
    def _localize(self, image: str | Path | Image.Image | np.ndarray | Tensor) -> Found:
        pixels = image.cpu().numpy() if isinstance(image, Tensor) else image
        if isinstance(pixels, np.ndarray) and pixels.ndim == 3 and pixels.shape[2] == 3:
            image = Image.fromarray(pixels) if pixels.dtype == np.uint8 and pixels.size else pixels
        if not isinstance(image, (str, Path, Image.Image)):
            form = f"{image.dtype} of shape {tuple(image.shape)}" if hasattr(image, "shape") else type(image)
            expected = "a path, a PIL image, or an array or tensor H x W x 3 of uint8"
            raise InputError(f"images: expected {expected}, or a list of these, got {form}")
        image = open_rgb(image, upright=True)
        run, size = self.run, self.run.config.image_size
        pixels = pil_to_tensor(image.resize((size, size), Image.Resampling.BILINEAR))
        with utils.autocast(run.device, run.amp):
            logits, maps = run.method.predict(to_input(pixels[None], run.device))
        maps = cam.normalize(cam.resize(maps, size, run.method.upsampling), *self.how)
        score_map = maps[0].cpu().numpy()
        level = fixed_level(score_map, self.threshold) if self.level is None else self.level
        box = original_box(level_boxes(score_map).largest[level], size, image.size)
        probabilities, names = full_precision(logits)[0].softmax(0), run.state["classes"]
        top = probabilities.topk(min(5, len(probabilities)))
        best = list(zip(top.indices.tolist(), top.values.tolist()))
        top5 = [{"class": k, **({"name": names[k]} if names else {}), "probability": q} for k, q in best]
        return Found(box, top5, score_map)


def original_box(box: np.ndarray, size: int, image_size: tuple[int, int]) -> list[int] | None:
    """A box of the size x size map in pixels of an image (width, height): every pixel that it touches.

    None for the box 0, 0, 0, 0, which stands for no box.
    """
    if not box.any():
        return None
    x0, y0, x1, y1 = box.tolist()
    width, height = image_size
    # Pixels x0 ... x1 of the map cover the fractions x0 / size ... (x1 + 1) / size of the image's width.
    right, bottom = -(-(x1 + 1) * width // size) - 1, -(-(y1 + 1) * height // size) - 1
    return [x0 * width // size, y0 * height // size, right, bottom]


# ---------------------------------------------------------------------------------------------- pictures

TRUTH, PREDICTION = (40, 80, 255), (0, 220, 60)  # Fig. A4: ground truth blue, prediction green
# A perceptually uniform scale (dark blue, violet, red, orange, yellow): brightness grows with the value.
COLOURS = ((13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33))


def draw_boxes(
    image: Image.Image, score_map: np.ndarray, box: Any = None, truth: np.ndarray | None = None
) -> Tensor:
    """An image with its boxes, and below it the same under its score map: 3 x H x W uint8.

    image: RGB. score_map: h x w in [0, 1], stretched over it. box (4) and truth (G x 4): x0, y0, x1, y1 in
    pixels of `image`, green with its best IoU, and blue.
    """
    stretched = Image.fromarray(score_map).resize(image.size, Image.Resampling.BILINEAR)
    values, keys = np.asarray(stretched), np.linspace(0, 1, len(COLOURS))
    heat = np.stack([np.interp(values, keys, channel) for channel in zip(*COLOURS)])
    photo = pil_to_tensor(image)
    blend = (0.4 * photo + 0.6 * torch.from_numpy(heat)).round().to(torch.uint8)
    width, drawn = max(2, image.width // 100), [(truth, TRUTH), (None if box is None else [box], PREDICTION)]
    for boxes, colour in drawn:
        if boxes is not None:
            of_kind = torch.as_tensor(np.array(boxes))
            photo, blend = (
                draw_bounding_boxes(x, of_kind, colors=colour, width=width) for x in (photo, blend)
            )
    if box is not None and truth is not None:  # on the photo the text could hide a box
        labelled, text = to_pil_image(blend), f"IoU {iou_matrix(np.asarray(box), truth).max():.2f}"
        font = ImageFont.load_default(max(10, image.width // 16))
        places = [
            min(at + 3 * width, end - gap)
            for at, end, gap in zip(box, image.size, (5 * font.size, font.size))
        ]
        outline = dict(stroke_width=2, stroke_fill=(0, 0, 0))  # readable on every colour
        ImageDraw.Draw(labelled).text(places, text, PREDICTION, font, **outline)
        blend = pil_to_tensor(labelled)
    return make_grid([photo, blend], nrow=1, padding=0)


def draw_found(image: Image.Image, found: Found, side: int = 448) -> Tensor:
    """`draw_boxes` of a photo, scaled so that its longer side has `side` pixels."""
    scale = side / max(image.size)
    size = tuple(max(1, round(length * scale)) for length in image.size)
    box = found.box and [found.box[i] * size[i % 2] // image.size[i % 2] for i in range(4)]
    return draw_boxes(image.resize(size, Image.Resampling.BILINEAR), found.score_map, box)


def draw_split(path: Path, split: Split, batches: Iterable[MapBatch], level: int, columns: int = 3) -> None:
    """A grid of `draw_boxes` in the form of Fig. A4. level: of the largest contour."""
    own = [pair for batch in batches for pair in zip(batch.indices, batch.maps)]
    pictures = []
    for index, score_map in sorted(
        (pair for part in utils.all_gather(own) for pair in part), key=lambda x: x[0]
    ):
        box, zoom = level_boxes(score_map).largest[level], 1 + (len(score_map) < 224)
        truth = scale_boxes(split.boxes[index], tuple(split.sizes[index]), len(score_map))
        photo = open_rgb(split.path(index), upright=split.upright)
        photo = photo.resize((zoom * len(score_map),) * 2, Image.Resampling.BILINEAR)
        boxes = (zoom * corners + np.array([0, 0, zoom - 1, zoom - 1]) for corners in (box, truth))
        pictures.append(draw_boxes(photo, score_map, *boxes))
    if utils.rank() == 0:
        save_picture(path, make_grid(pictures, nrow=columns, padding=6, pad_value=255))
    utils.print_rank0(f"{len(pictures)} images with boxes in {path}")


def evenly_spaced(split: Split, n: int) -> Split:
    """n images of a split, evenly spaced, of those that have boxes: for `draw_split`."""
    boxed = sorted(split.boxes)
    chosen = np.linspace(0, len(boxed) - 1, min(n, len(boxed))).astype(int)
    return split.take([boxed[i] for i in chosen], split.name)


def save_picture(path: Path, picture: Tensor) -> None:
    """Writes 3 x H x W uint8 as PNG, all or nothing."""
    with utils.atomic_write(path) as part:
        to_pil_image(picture).save(part, format="PNG")
