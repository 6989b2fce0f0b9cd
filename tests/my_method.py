"""my_method.py: label smoothing, and Grad-CAM's map, the positive part of CAM in a network with GAP."""

import torch.nn.functional as nnf

import train
from bridge_wsol.methods import CAM
from bridge_wsol.utils import Value, one_line_errors


class GradCAM(CAM, name="gradcam"):
    values = {"smoothing": Value(float, 0.1, "label smoothing", "[0, 1]", "our choice")}  # --smoothing

    def terms(self, passes, labels, epoch):  # name: (weight, value)
        smoothing, logits = self.config.smoothing, passes.logits.float()
        return {"l_ce": (1.0, nnf.cross_entropy(logits, labels, label_smoothing=smoothing))}

    def predict(self, images, labels=None):
        logits, maps = super().predict(images, labels)
        return logits, maps.relu()


if __name__ == "__main__":
    with one_line_errors():
        train.main()
