"""my_method.py: label smoothing, and Grad-CAM's map, the positive part of CAM in a network with GAP."""

import torch.nn.functional as nnf

import train
from bridge_wsol.methods import CAM
from bridge_wsol.utils import one_line_errors


class GradCAM(CAM, name="gradcam"):
    allowed = {"smoothing": (0, 1)}

    @classmethod
    def preset(cls, dataset, arch):  # each name becomes a flag: --smoothing
        return super().preset(dataset, arch) | {"smoothing": (0.1, "our choice")}

    def terms(self, model, output, labels, epoch):  # name: (weight, value)
        smoothing, logits = self.config.smoothing, output.logits.float()
        return {"l_ce": (1.0, nnf.cross_entropy(logits, labels, label_smoothing=smoothing))}

    def predict(self, model, images, labels=None):
        logits, maps = super().predict(model, images, labels)
        return logits, maps.relu()


if __name__ == "__main__":
    with one_line_errors():
        train.main()
