"""bridge-wsol: "Bridging the Gap between Classification and Localization for WSOL" (Kim et al., CVPR 2022).

Conventions of the whole package:
    boxes       x0, y0, x1, y1 in integer pixels, both corners inside the box
    maps        H x W, float32, in [0, 1] once normalized
    thresholds  fractions of a map's maximum; a *level* is the uint8 value floor(255 * threshold)
    results     percent

Modules, in the order of the paper: `losses` (section 3), `models` (VGG16-GAP, ResNet50), `cam` (|w| * F * S, Fig. A3),
`boxes` and `metrics` (the evaluation protocol of Choe et al.), `data` and `datasets`, `optim` (appendix B and C.5), `utils`; and `baselines` (this method and those
it is compared with, as train.py runs them), `demo` (the drawn data set), `figures` (pictures in the appendix's form).
"""

__version__ = "0.1.0"
