"""Imagenette as a folder of own photos, on which the preset of folders was chosen (docs/results/folder.md).

    python tests/imagenette_folder.py IMAGENETTE OUT [CLASSES PHOTOS]

Copies the images of ILSVRC val that have a published box, 50 of each of the ten classes, from the folder of
`imagenette2` to OUT/<wnid>/ and writes their boxes, in pixels of the copies, to OUT/localization.txt.
"""

import shutil
import sys
from collections import Counter
from pathlib import Path

from PIL import Image

from bridge_wsol.datasets import load_split


def main(root: Path, out: Path, classes: int = 10, photos: int = 50) -> None:
    """Writes at most `photos` images of each of the first `classes` classes."""
    lines, taken = [], Counter()
    for split in (load_split("Imagenette", name, str(root)) for name in ("val", "test")):
        for i in range(len(split)):
            label, source = int(split.labels[i]), split.path(i)
            if label >= classes or taken[label] == photos:
                continue
            taken[label] += 1
            image = f"{source.parent.name}/{source.name}"
            (out / image).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, out / image)
            size = Image.open(source).size
            for box in split.boxes[i].tolist():
                x0, y0 = (box[axis] * size[axis] // split.sizes[i][axis] for axis in (0, 1))
                # The corner is inside the box: it ends with the pixel.
                x1, y1 = (-(-(box[axis + 2] + 1) * size[axis] // split.sizes[i][axis]) - 1 for axis in (0, 1))
                lines.append(f"{image},{x0},{y0},{x1},{y1}")
    (out / "localization.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
