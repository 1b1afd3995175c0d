"""UniT's heads of detection (Hu & Singh, ICCV 2021, section 3.5), which are DETR's, and the one of attributes.

B batch, L decoder layers, Q queries, D width, K classes, M rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trivium.models.encoded import Found


@dataclass(frozen=True)
class Detections:
    """What a head of detection gives, for each decoder layer."""

    logits_LBQK: Tensor  # the last class is "no object"
    boxes_LBQ4: Tensor  # (centre x, centre y, width, height) as shares of the picture without padding
    hidden_LBQD: Tensor  # what they were read from: `head.attributes(hidden_MD, class_M)` takes rows of it


class DetectionHead(nn.Module):
    """Of each query a class, "no object" the last, and a box.

    num_anchors: of queries that have a box of their own to correct (see `UnitConfig.anchored`); 0: they have none.
    """

    def __init__(
        self, width: int, num_labels: int, num_attributes: int | None, attribute_width: int, num_anchors: int = 0
    ) -> None:
        super().__init__()
        self.anchors = nn.Parameter(torch.zeros(num_anchors, 4)) if num_anchors else None  # logits of shares
        self.classes = nn.Linear(width, num_labels + 1)
        self.boxes = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 4)])
        self.attributes = None
        if num_attributes is not None:
            self.attributes = AttributeHead(width, num_labels, num_attributes, attribute_width)

    def forward(self, hidden_LBQD: Tensor) -> Detections:
        x = hidden_LBQD
        for layer in self.boxes[:-1]:
            x = F.relu(layer(x))
        last = self.boxes[-1]
        # Outside of autocast: in bfloat16 a share of 0.5 has steps of a pixel in five hundred.
        with torch.autocast(x.device.type, enabled=False):
            boxes_LBQ4 = last(x.to(last.weight.dtype))  # type: ignore[arg-type]
            boxes_LBQ4 = (boxes_LBQ4 if self.anchors is None else boxes_LBQ4 + self.anchors).sigmoid()
        return Detections(self.classes(hidden_LBQD), boxes_LBQ4, hidden_LBQD)


class AttributeHead(nn.Module):
    """Of a query and its class, the attributes: two linear maps with nothing between them, and a ReLU at the end, as
    the released weights were trained."""

    def __init__(self, width: int, num_labels: int, num_attributes: int, inner_width: int) -> None:
        super().__init__()
        self.classes = nn.Embedding(num_labels + 1, inner_width)
        self.inner = nn.Linear(width + inner_width, 2 * inner_width)
        self.decoder = nn.Linear(2 * inner_width, num_attributes)

    def forward(self, hidden_MD: Tensor, class_M: Tensor) -> Tensor:
        """Logits [M, K]. class_M: int64, the true class in training, the likeliest one afterwards."""
        rows = torch.cat([hidden_MD, self.classes(class_M).to(hidden_MD.dtype)], dim=-1)
        return F.relu(self.decoder(self.inner(rows)))


def likeliest(seen: Detections, head: DetectionHead) -> Found:
    """Of each query of the last layer its likeliest class, "no object" left out, as COCO's mAP wants it; and of that
    class the strongest attribute."""
    scores_BQ, labels_BQ = seen.logits_LBQK[-1].float().softmax(-1)[..., :-1].max(-1)
    centre_BQ2, size_BQ2 = seen.boxes_LBQ4[-1].chunk(2, dim=-1)
    boxes_BQ4 = torch.cat([centre_BQ2 - size_BQ2 / 2, centre_BQ2 + size_BQ2 / 2], dim=-1)
    if head.attributes is None:
        return Found(scores_BQ, labels_BQ, boxes_BQ4)
    strength_BQ, attributes_BQ = head.attributes(seen.hidden_LBQD[-1], labels_BQ).max(-1)
    return Found(scores_BQ, labels_BQ, boxes_BQ4, attributes_BQ, strength_BQ)
