"""A tiny UniT of random weights and, for each kind of its tasks, a generated batch: boxes in pictures of different
sizes, answers to questions about such, labels of pairs of texts.

B rows of a batch, T text tokens, M boxes, K classes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from trivium.methods.pixels import Pixels
from trivium.methods.unit import Labels, UnitMethod
from trivium.models.unit import Unit, UnitConfig, UnitTask
from trivium.train.protocol import Batch, Images, Texts

TASKS = (
    UnitTask("vg", "detection", "image", 6, 1, num_queries=5, num_attributes=7),
    UnitTask("vqav2", "labels", "both", 4, 3, num_queries=3, text="all"),
    UnitTask("qnli", "labels", "text", 2, 5, num_queries=3),
)
TARGETS: dict[str, Labels] = {"vqav2": "answers", "qnli": "label"}
TINY = UnitConfig.of_size(
    "tiny", tasks=TASKS, width=32, num_heads=4, mlp_width=48, decoder_layers=2, image_width=24, image_layers=1,
    backbone_widths=(8, 8, 16, 16), text_width=32, text_heads=4, text_mlp_width=48, text_layers=2, vocab_size=61,
    max_length=16, num_task_tokens=8, attribute_width=12,
)  # fmt: skip
ROWS = 16  # of the global batch
SIDE = 40  # pixels of the largest picture
MOST_BOXES, PLACES = 4, 3  # of a picture; for attributes of a box
FIRST_ASKING = "decoders.shared.blocks.0.attention.qkv.weight"
LENGTH = 9  # tokens of the longest text


def case(task: str, dtype: torch.dtype, dropout: float) -> tuple[UnitMethod, Batch]:
    """As `trivium.invariance` takes it. What has no effect on any loss is not trained: its gradient is rounding alone.

    The first decoder layer's self-attention reads zeros, so that what it asks and gives is the same whatever is
    weighted; and where a picture is all the memory, the same added to each of its places leaves attention as it was.
    """
    method = unit_method(random_unit(replace(TINY, dropout=dropout), dtype))
    for name, parameter in method.model.named_parameters():
        if name == FIRST_ASKING or (name == "image_places.bias" and task == "vg"):
            parameter.requires_grad_(False)
    return method, make_batch(task, ROWS)


def random_unit(config: UnitConfig = TINY, dtype: torch.dtype = torch.float64, seed: int = 0) -> Unit:
    """Every tensor drawn: nothing is zero or one by luck."""
    model = Unit(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if name.endswith("norm.weight") else 0.0
            scale = 1.0 if name.startswith("queries.") or parameter.ndim == 4 else 0.1
            scale = scale / parameter[0].numel() ** 0.5 if parameter.ndim == 4 else scale
            parameter.copy_(centre + scale * torch.randn(parameter.shape, generator=generator))
    return model


def unit_method(model: Unit) -> UnitMethod:
    """Mean 1/2 and deviation 1/4 are exact in every precision."""
    method = UnitMethod(model, Pixels((0.5,) * 3, (0.25,) * 3), TARGETS)
    return method.to(next(model.parameters()).dtype)


def make_batch(task: str, rows: int, seed: int = 0) -> Batch:
    """One global batch of a task."""
    draw = torch.Generator().manual_seed(seed)
    row_B = torch.arange(rows)
    batch = Batch(task, row_B, row_B.clone())
    if task != "qnli":
        batch.images = (_pictures(rows, draw),)
    if task != "vg":
        batch.texts = (_texts(rows, draw),)
    batch.targets = {"vg": _boxes, "vqav2": _answers, "qnli": _labels}[task](rows, draw)
    return batch


def _pictures(rows: int, draw: torch.Generator) -> Images:
    sizes_B2 = torch.randint(SIDE // 2, SIDE + 1, (rows, 2), generator=draw)
    sizes_B2[0] = SIDE
    pixels_BCHW = torch.randint(0, 256, (rows, 3, SIDE, SIDE), generator=draw, dtype=torch.uint8)
    for row, (height, width) in enumerate(sizes_B2.tolist()):
        pixels_BCHW[row, :, height:] = 0
        pixels_BCHW[row, :, :, width:] = 0
    return Images(pixels_BCHW, torch.arange(rows), sizes_B2)


def _texts(rows: int, draw: torch.Generator) -> Texts:
    mask_BT = torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (rows, 1), generator=draw)
    mask_BT[0] = True
    ids_BT = torch.randint(5, TINY.vocab_size, (rows, LENGTH), generator=draw).where(mask_BT, TINY.pad_id)
    segments_BT = torch.randint(0, 2, (rows, LENGTH), generator=draw)
    return Texts(ids_BT, mask_BT, torch.arange(rows), segments_BT)


def _boxes(rows: int, draw: torch.Generator) -> dict[str, Tensor]:
    """From none to four a picture, some without attributes."""
    number_B = torch.randint(0, MOST_BOXES + 1, (rows,), generator=draw)
    row_M = torch.repeat_interleave(number_B)
    num_boxes = len(row_M)
    size_M2 = 0.1 + 0.4 * torch.rand(num_boxes, 2, generator=draw)
    centre_M2 = size_M2 / 2 + (1 - size_M2) * torch.rand(num_boxes, 2, generator=draw)
    attributes_MA = torch.randint(-1, 7, (num_boxes, PLACES), generator=draw)
    attributes_MA[::3] = -1
    return {
        "box": torch.cat([centre_M2, size_M2], dim=1),
        "box_class": torch.randint(0, 6, (num_boxes,), generator=draw),
        "box_row": row_M,
        "box_attributes": attributes_MA,
    }


def _answers(rows: int, draw: torch.Generator) -> dict[str, Tensor]:
    return {"answers": torch.rand(rows, 4, generator=draw)}


def _labels(rows: int, draw: torch.Generator) -> dict[str, Tensor]:
    return {"label": torch.randint(0, 2, (rows,), generator=draw)}
