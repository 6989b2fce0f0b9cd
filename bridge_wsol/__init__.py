"""bridge-wsol: "Bridging the Gap between Classification and Localization for WSOL" (Kim et al., CVPR 2022).

The modules by layer; a module imports only from its own layer or those below. train.py and evaluate.py stand
above all.

    reproduce/  baselines    the compared systems, a class each
                demo         the drawn birds
                experiments  rows x seeds of train.py: comparison, sweep, tables, differences
                figures      Figs. A1-A5 and the gap in numbers, from runs and results
    a run       localize     Localizer: boxes and pictures for photos
                evaluation   score maps -> metrics, trained runs, results files
                config       presets with their sources, flags -> configuration, fingerprint
    images      datasets     CUB, ILSVRC, OpenImages, one's own folder; download, check
                data         list format, images and masks, score-map files, loaders
    protocol    metrics      one image, all images: MaxBoxAccV2, GT-known and Top-k Loc, PxAP; intervals
                boxes        a map -> the boxes of all thresholds
    the paper   methods      what a method is: CAM, and Bridge, the paper's method
                optim        appendix B: learning-rate groups, SGD, schedule
                models       VGG16-GAP, ResNet50, pretrained weights
                cam          CAM = |w| * F * S (Fig. A3), resize, normalization
                losses       section 3: L_sim, L_norm, L_drop, attentive dropout
    ground      utils        errors, files, values, progress, devices, processes

Conventions:
    boxes       x0, y0, x1, y1 in integer pixels, both corners inside the box
    maps        H x W floats, in [0, 1] once normalized
    thresholds  fractions in [0, 1) of the quantized range; a *level* is floor(255 * threshold), 0 ... 254
    results     percent
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Loaded when they are first asked for: `import bridge_wsol` loads no torch.
_EXPORTS = {
    "Localizer": "localize",
    "TrainedRun": "evaluation",
    "evaluate_score_maps": "evaluation",
    "load_split": "datasets",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
