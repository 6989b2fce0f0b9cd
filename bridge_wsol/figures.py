"""Pictures of results, in the form of the appendix's figures, by Pillow alone."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from .boxes import iou_matrix

TRUTH, PREDICTION = (40, 80, 255), (0, 220, 60)  # Fig. A4: ground truth blue, prediction green

# Key colours of a perceptually uniform map (dark blue, violet, red, orange, yellow): brightness grows with the value.
COLOURS = np.array([(13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33)], dtype=float)


def colourise(score_map: np.ndarray) -> np.ndarray:
    """H x W in [0, 1] -> H x W x 3 uint8."""
    position = np.clip(score_map, 0, 1) * (len(COLOURS) - 1)
    keys = np.arange(len(COLOURS))
    return np.stack([np.interp(position, keys, COLOURS[:, c]) for c in range(3)], axis=-1).round().astype(np.uint8)


def localization(
    image: Image.Image, score_map: np.ndarray, predicted: np.ndarray | None = None, truth: np.ndarray | None = None
) -> Image.Image:
    """Fig. A4 for one image: boxes above, the map under it. Ground truth blue, prediction green, their best IoU printed.

    image: RGB of the map's size; score_map H x W in [0, 1]; boxes in its pixels: predicted 4, truth G x 4.
    """
    width, height = image.size
    blend = np.asarray(image, dtype=float) * 0.4 + colourise(score_map) * 0.6
    picture = Image.new("RGB", (width, 2 * height))
    picture.paste(image.convert("RGB"), (0, 0))
    picture.paste(Image.fromarray(blend.round().astype(np.uint8)), (0, height))
    draw = ImageDraw.Draw(picture)
    for box in [] if truth is None else truth:
        draw.rectangle([int(x) for x in box], outline=TRUTH, width=2)
    if predicted is not None:
        draw.rectangle([int(x) for x in predicted], outline=PREDICTION, width=2)
        if truth is not None:
            text = f"IoU {iou_matrix(predicted, truth).max():.2f}"
            draw.rectangle([0, 0, 8 + 6 * len(text), 14], fill=(0, 0, 0))
            draw.text((4, 1), text, fill=(255, 255, 255))
    return picture
