"""bridge-wsol: "Bridging the Gap between Classification and Localization for WSOL" (Kim et al., CVPR 2022).

The modules by layer. A module imports from its own layer or a lower one; train.py and evaluate.py from all.

    many runs   experiments  rows x seeds of train.py: comparison, ablation, sweep; tables
    pictures    figures      Figs. A1-A5 and the gap in numbers, from runs and results
                drawing      images, maps and boxes as pictures, with Pillow alone
    evaluation  evaluation   score maps -> metrics, files of a run, Localizer
    methods     methods      what a method is; CAM; Bridge, the paper's total loss
                baselines    the compared systems, a class each
    the paper   losses       section 3: L_sim, L_norm, L_drop, attentive dropout
                cam          CAM = |w| * F * S (Fig. A3), resize, normalization
                models       VGG16-GAP, ResNet50; files of weights
                optim        presets (B, C.5), flags, learning-rate groups, schedule
    protocol    boxes        a map -> the boxes of all thresholds
                metrics      MaxBoxAcc, MaxBoxAccV2, GT-known and Top-k Loc, PxAP
    images      data         list format, decoding, loaders, cache
                datasets     CUB, ILSVRC, OpenImages, one's own folder, drawn ones; check
                demo         the drawn birds
    basics      processes    torchrun, signals, worker processes
                utils        errors, progress, devices, files

Conventions:
    boxes       x0, y0, x1, y1 in integer pixels, both corners inside the box
    maps        H x W floats, in [0, 1] once normalized
    thresholds  fractions in [0, 1) of the quantized range; a *level* is floor(255 * threshold), 0 ... 254
    results     percent
"""

__version__ = "0.1.0"
