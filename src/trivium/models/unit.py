"""UniT: Multimodal Multitask Learning with a Unified Transformer (Hu & Singh, ICCV 2021, arXiv 2102.10772).

A ResNet and a transformer read the picture, a BERT reads the words, and one decoder asks both with queries that each
task has of its own; on top stands a head per task. Easy to get wrong:

* positions are added to queries and keys in every layer, never to values; the encoder's output is added to its input
  once more, after the last layer;
* the token of the task stands first in either encoder, without a position, after BERT's embedding norm, and is taken
  off again before the decoder;
* all but VQA's decoder read of a text its class token alone, so that for tasks of text the memory has one position and
  the queries are inert: without dropout one of them gives what all would;
* a head of labels reads the first query of the last layer; a head of detection every query, in training of every layer;
* padded pictures give what each gives alone (`layers/resnet.py`).

How it is used, by name of a task in `config.tasks`:

    image = model.encode_image(pixels_BCHW, sizes_B2, "vqav2")
    text = model.encode_text(ids_BT, mask_BT, segments_BT, "vqav2")
    hidden_LBQD = model.decode("vqav2", image, text)          # detection: all layers; labels: [1, B, 1, D]
    logits_BK = model.heads["vqav2"](hidden_LBQD[-1, :, 0])   # or all of it: model.label("vqav2", image, text)
    found = model.heads["coco"](model.decode("coco", image))  # Detections: logits_LBQK, boxes_LBQ4

B batch, C channels, H height, W width, N image tokens, T text tokens, S positions of the decoder's memory, L decoder
layers, Q queries, E width of the image encoder, D width of the decoder, K classes, M rows of any kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trivium.errors import TriviumError
from trivium.layers.attention import attend
from trivium.layers.embeddings import sine_positions
from trivium.layers.heads import MaskedHead
from trivium.layers.resnet import ResNet
from trivium.models.bert import Bert, BertConfig
from trivium.models.encoded import Encoded


@dataclass(frozen=True)
class UnitTask:
    """One task of a model. What trains and measures it is elsewhere."""

    name: str
    kind: Literal["detection", "labels"]
    reads: Literal["image", "text", "both"]
    num_labels: int  # of detection: the largest category id + 1; the class "no object" comes on top
    number: int  # its row in the tables of task tokens
    num_queries: int = 25
    num_attributes: int | None = None  # of a detected object, with number 0 for none; None: no such head
    text: Literal["class", "all"] = "class"  # which of the text's tokens the decoder reads


PUBLISHED_TASKS = (
    UnitTask("coco", "detection", "image", 91, 0, 100),
    UnitTask("vg", "detection", "image", 1601, 1, 100, num_attributes=401),
    UnitTask("vqav2", "labels", "both", 3129, 3, text="all"),
    UnitTask("snli_ve", "labels", "both", 3, 9),
    UnitTask("qnli", "labels", "text", 2, 5),
    UnitTask("mnli", "labels", "text", 3, 6),
    UnitTask("sst2", "labels", "text", 2, 7),
    UnitTask("qqp", "labels", "text", 2, 8),
)


@dataclass(frozen=True)
class UnitConfig:
    """The published model of eight tasks by default: 201,507,900 parameters beside BERT's unused pooler."""

    tasks: tuple[UnitTask, ...] = PUBLISHED_TASKS
    decoder: Literal["shared", "separate"] = "shared"  # one for all tasks, or one for each
    width: int = 768  # of the decoder
    num_heads: int = 8  # of the decoder and of the image encoder
    mlp_width: int = 2048  # of both
    decoder_layers: int = 6
    image_width: int = 256
    image_layers: int = 6
    backbone_widths: tuple[int, ...] = (64, 128, 256, 512)  # of the 3 x 3 convolutions, stage by stage
    backbone_blocks: tuple[int, ...] = (3, 4, 6, 3)
    bottleneck: bool = True  # 1 x 1, 3 x 3, 1 x 1 to four times the width; False: 3 x 3, 3 x 3
    backbone_norm: Literal["frozen", "group"] = "frozen"  # batch norm of loaded weights, or GroupNorm
    backbone_eps: float = 1e-5  # 0 in the torchvision of the paper's time, 1e-5 in DETR and today
    dilated: bool = True  # the last stage keeps its resolution (DC5)
    text_width: int = 768
    text_heads: int = 12
    text_mlp_width: int = 3072
    text_layers: int = 12  # 0: no text encoder, where no task reads one
    vocab_size: int = 30522
    max_length: int = 512  # text positions
    num_segments: int = 2
    pad_id: int = 0
    text_eps: float = 1e-12  # of every LayerNorm of the text encoder, and of the heads of labels
    eps: float = 1e-5  # of those of image encoder and decoder
    dropout: float = 0.1
    num_task_tokens: int = 256  # rows in the tables of task tokens; 0: no task tokens
    residual: bool = True  # the encoder's input is added to its output (False: DETR)
    attribute_width: int = 256  # of the class embedding that the head of attributes reads; its inside is twice that

    @classmethod
    def of_size(cls, size: str, **changes: Any) -> UnitConfig:
        """`size` is "tiny", "small" or "base" (the published one), with single fields changed."""
        return replace(SIZES[size], **changes)


class Unit(nn.Module):
    """Both encoders, the decoder or decoders, queries and heads of every task."""

    config: UnitConfig
    heads: nn.ModuleDict  # name of a task -> DetectionHead or MaskedHead

    def task(self, name: str) -> UnitTask:
        """Raises TriviumError where there is none of this name."""

    def encode_image(self, pixels_BCHW: Tensor, sizes_B2: Tensor | None = None, task: str | None = None) -> Encoded:
        """Normalised pixels, float [B, 3, H, W], of any size -> `states` [B, N, D] as the decoder reads them.

        Args:
            sizes_B2: (height, width) of each picture, which begins at the top left; what lies beyond has no effect.
                None: no padding. On any device; on CPU nothing waits for it.
            task: whose token is read with it; None: of the first task that reads pictures.
        """

    def encode_text(
        self,
        ids_BT: Tensor,
        mask_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        task: str | None = None,
    ) -> Encoded:
        """Token ids, int64 [B, T] -> `states` [B, T, D], or [B, 1, D] of a task that reads the class token alone.

        Args:
            mask_BT: bool, True = a real token. None attends pads too.
            task: whose token is read with it; None: of the first task that reads texts, all of whose tokens are given.
        """

    def decode(self, task: str, image: Encoded | None, text: Encoded | None = None, last: bool = False) -> Tensor:
        """What the queries of a task found: [L, B, Q, D] of detection ([1, B, Q, D] with `last`), [1, B, 1, D] of
        labels. After the final norm. `image` and `text`: those that the task reads, encoded for it."""

    def label(self, task: str, image: Encoded | None, text: Encoded | None = None) -> Tensor:
        """Logits [B, K] of a task of labels."""

    def detect(self, pixels_BCHW: Tensor, sizes_B2: Tensor | None = None, task: str | None = None) -> Found:
        """The objects of pictures (section 3.5), as COCO counts them: of each query its likeliest class."""


@dataclass(frozen=True)
class Detections:
    """What a head of detection gives, for each decoder layer."""

    logits_LBQK: Tensor  # the last class is "no object"
    boxes_LBQ4: Tensor  # (centre x, centre y, width, height) as shares of the picture without padding
    hidden_LBQD: Tensor  # what they were read from: `head.attributes(hidden_MD, class_M)` takes rows of it


@dataclass(frozen=True)
class Found:
    """Objects in pictures."""

    scores_BQ: Tensor  # probability of the class
    labels_BQ: Tensor  # int64
    boxes_BQ4: Tensor  # (left, top, right, bottom) as shares of the picture without padding
    attributes_BQ: Tensor | None = None  # int64, where the task has them
    attribute_scores_BQ: Tensor | None = None  # not probabilities: the published head ends in a ReLU
