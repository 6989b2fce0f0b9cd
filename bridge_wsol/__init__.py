"""bridge-wsol: "Bridging the Gap between Classification and Localization for WSOL" (Kim et al., CVPR 2022).

The rooms, from the ground up. A room imports only from rooms of its own floor or below; train.py and
evaluate.py stand above all.

    beyond      experiments  rows x seeds of train.py: comparison, ablation, sweep; tables
                figures      Figs. A1-A5 and the gap in numbers, from runs and results
                evaluation   score maps -> metrics, results files, a trained run, Localizer
                config       presets with their sources, flags -> configuration
                datasets     CUB, ILSVRC, OpenImages, one's own folder, the drawn birds; check
                demo         the drawn birds
                baselines    the compared systems, a class each
    the paper   methods      what a method is: CAM, and Bridge, the paper's method
                optim        appendix B: learning-rate groups, SGD, schedule
                models       VGG16-GAP, ResNet50, pretrained weights
                cam          CAM = |w| * F * S (Fig. A3), resize, normalization
                losses       section 3: L_sim, L_norm, L_drop, attentive dropout
    protocol    bootstrap    what the choice of test images changes: intervals, paired differences
                metrics      one image, all images: MaxBoxAcc, MaxBoxAccV2, GT-known and Top-k Loc, PxAP
                boxes        a map -> the boxes of all thresholds
    ground      data         list format, decoding, score-map files, loaders
                utils        errors, files, progress, devices, processes

Conventions:
    boxes       x0, y0, x1, y1 in integer pixels, both corners inside the box
    maps        H x W floats, in [0, 1] once normalized
    thresholds  fractions in [0, 1) of the quantized range; a *level* is floor(255 * threshold), 0 ... 254
    results     percent
"""

__version__ = "0.1.0"
