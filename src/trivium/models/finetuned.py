"""A trained model of any family with a head for one task.

What the head reads is one vector of a sample:

    text           the pooled text
    image          the pooled picture
    fused          the class token of the multimodal encoder, of a model that reads both together (FLAVA, section 4.2)
    concatenated   pooled picture and pooled text side by side, of a model that does not (FLAVA, appendix B.2, for CLIP)

B batch, C channels, H height, W width, T text tokens, D width of what the head reads, K outputs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trivium.layers.heads import TaskHead
from trivium.models.bert import Bert
from trivium.models.encoded import EncodesImage, EncodesText, Fuses
from trivium.models.flava import Flava

Reads = Literal["text", "image", "fused", "concatenated"]
Gives = Literal["class", "number", "answers"]


@dataclass(frozen=True)
class HeadConfig:
    """What of a fine-tuned model its trained model does not say."""

    task: str  # its name
    reads: Reads
    gives: Gives  # one right class, a number, or answers that are more or less right
    width: int  # of what it reads
    num_outputs: int
    hidden: int | None = None  # width of its inner layer; None: a linear map alone
    activation: Literal["tanh", "gelu", "relu"] = "tanh"
    dropout: float = 0.1
    center: float = 0.0  # a number is output x scale + center
    scale: float = 1.0

    def build(self) -> TaskHead:
        return TaskHead(self.width, self.hidden, self.num_outputs, self.activation, self.dropout)


def tells_segments_apart(model: nn.Module) -> bool:
    """Whether two texts go in as one sequence with a [SEP] and a segment for each."""
    return isinstance(model, Flava | Bert) and model.config.num_segments > 1


class FineTuned(nn.Module):
    """Model and head."""

    def __init__(self, backbone: nn.Module, head: nn.Module, config: HeadConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.config = config

    def config_dict(self) -> dict[str, Any]:
        """Of the head."""
        return asdict(self.config)

    def forward(
        self,
        pixels_BCHW: Tensor | None,
        ids_BT: Tensor | None,
        mask_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits or numbers [B, K]. Pixels are normalised."""
        return self.head(read(self.backbone, self.config.reads, pixels_BCHW, ids_BT, mask_BT, segments_BT))

    def answers(self, outputs_BK: Tensor) -> Tensor:
        """What is answered: numbers in their own unit [B, 1], probabilities of classes [B, K], or how right each
        answer is [B, K]."""
        outputs_BK = outputs_BK.float()
        if self.config.gives == "number":
            return outputs_BK * self.config.scale + self.config.center
        return outputs_BK.softmax(-1) if self.config.gives == "class" else outputs_BK.sigmoid()


def read(
    model: nn.Module,
    reads: Reads,
    pixels_BCHW: Tensor | None,
    ids_BT: Tensor | None,
    mask_BT: Tensor | None,
    segments_BT: Tensor | None,
) -> Tensor:
    """The vector of each sample, [B, D]. Of the last blocks no more is computed than is read."""
    class_alone = 1 if reads != "fused" else None  # of families whose class token stands first
    image = text = None
    if reads != "text":
        assert isinstance(model, EncodesImage) and pixels_BCHW is not None
        image = (
            model.encode_image(pixels_BCHW, rows=class_alone)
            if isinstance(model, Flava)
            else model.encode_image(pixels_BCHW)
        )
    if reads != "image":
        assert isinstance(model, EncodesText) and ids_BT is not None
        text = (
            model.encode_text(ids_BT, mask_BT, segments_BT, class_alone)
            if isinstance(model, Flava | Bert)
            else model.encode_text(ids_BT, mask_BT)
        )
    if image is None or text is None:
        only = image or text
        assert only is not None
        return only.pooled
    if reads == "concatenated":
        return torch.cat([image.pooled, text.pooled], dim=-1)
    assert isinstance(model, Fuses)
    return model.fuse(image, text, rows=1).pooled
