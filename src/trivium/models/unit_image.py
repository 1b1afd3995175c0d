"""UniT's image encoder: a ResNet, and DETR's transformer over its feature map (Hu & Singh 2021, section 3.1).

Pictures of different sizes are either padded to the largest, or, on a processor, nothing is padded: those of one size
make a run, what looks at neighbours goes through run by run, and all else takes the positions of all runs at once.

B batch, U sizes of pictures, C channels, H height, W width, N image tokens, P positions of all pictures, one after the
other, E width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from trivium.layers.embeddings import sine_positions
from trivium.layers.packing import Runs
from trivium.layers.resnet import ResNet
from trivium.models.unit_transformer import EncoderBlock, TaskTokens


def goes_apart(device: torch.device) -> bool:
    """Whether pictures of one size are encoded together and others apart: on a processor, where arithmetic decides and
    padding is a third of it. A GPU is faster with all of them in one pass."""
    return device.type == "cpu"


def by_size(pixels_BCHW: Tensor, sizes_B2: Tensor) -> tuple[list[Tensor], list[int]]:
    """Pictures of one size in a run of their own, [n, C, H, W] each without padding, and where among all of them, run
    after run, each picture of the batch is."""
    kinds_U2, kind_B = torch.unique(sizes_B2.cpu(), dim=0, return_inverse=True)
    if len(kinds_U2) == 1:
        height, width = kinds_U2[0].tolist()
        return [pixels_BCHW[:, :, :height, :width]], list(range(len(pixels_BCHW)))
    order_B = kind_B.argsort(stable=True)
    rows = order_B.split(kind_B.bincount().tolist())
    pictures = [pixels_BCHW[of_run, :, :h, :w] for of_run, (h, w) in zip(rows, kinds_U2.tolist(), strict=True)]
    return pictures, order_B.argsort().tolist()


class ImageEncoder(nn.Module):
    """ResNet, and a transformer over its feature map."""

    def __init__(
        self,
        backbone: ResNet,
        width: int,
        task_tokens: TaskTokens | None,
        blocks: Sequence[EncoderBlock],
        *,
        place_temperature: float,
        place_scale: float,
        residual: bool,
    ) -> None:
        super().__init__()
        self.place_temperature = place_temperature
        self.place_scale = place_scale
        self.residual = residual
        self.backbone = backbone
        self.projection = nn.Linear(backbone.out_channels, width)
        self.task_tokens = task_tokens
        self.blocks = nn.ModuleList(blocks)

    def forward(self, pixels_BCHW: Tensor, sizes_B2: Tensor | None, task: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """States and places, [B, N, E] each (places [1, N, E] where all pictures are of one size), and the mask; None:
        all are real. Positions of a picture stand row by row, and where all go together as in the padded map."""
        pictures, of_B = [pixels_BCHW], list(range(len(pixels_BCHW)))
        if sizes_B2 is not None and len(sizes_B2) and goes_apart(pixels_BCHW.device):
            pictures, of_B = by_size(pixels_BCHW, sizes_B2)
            sizes_B2 = None
        x, reach = self.backbone(pictures, sizes_B2)
        places = [self._places(height, width, reach.sizes_B2) for _, height, width in reach.runs]
        mask_BN = None if reach.mask is None else reach.mask.flatten(1)
        del pictures  # copies, where there are several runs
        if len(reach.runs) == 1:
            sources = [self.projection(x.flatten(2).transpose(1, 2))]
        else:
            shapes = tuple((number, height * width) for number, height, width in reach.runs)
            sources = Runs(shapes).unpack(self.projection(x))
        states = self._transformed(sources, places, mask_BN, task)
        if self.residual:
            states = [source + x for source, x in zip(sources, states, strict=True)]
        if len(states) == 1:
            return states[0], places[0], mask_BN
        each = [(x_NE, places_1NE[0]) for x, places_1NE in zip(states, places, strict=True) for x_NE in x]
        of_each, places_of_each = zip(*(each[at] for at in of_B), strict=True)
        lengths_B = torch.tensor([len(x_NE) for x_NE in of_each])
        mask_BN = torch.arange(int(lengths_B.max())) < lengths_B[:, None]
        padded = pad_sequence(list(of_each), batch_first=True), pad_sequence(list(places_of_each), batch_first=True)
        return *padded, None if bool(mask_BN.all()) else mask_BN

    def _places(self, height: int, width: int, sizes_B2: Tensor | None) -> Tensor:
        """[B, N, E], or [1, N, E] of pictures that fill their maps."""
        weight = self.projection.weight
        reach_B2 = torch.tensor([[height, width]], device=weight.device) if sizes_B2 is None else sizes_B2
        places = sine_positions(reach_B2, height, width, len(weight), weight.dtype, self.place_temperature)
        return self.place_scale * places

    def _transformed(
        self, states: list[Tensor], places: list[Tensor], mask_BN: Tensor | None, task: str
    ) -> list[Tensor]:
        """What the blocks make of the states of each run, [n, N, E]. Several runs are packed: what knows nothing of
        neighbours takes all their positions at once."""
        if self.task_tokens is not None:
            states = [self.task_tokens.before(x, task) for x in states]
            places = [F.pad(x, (0, 0, 1, 0)) for x in places]
            mask_BN = None if mask_BN is None else F.pad(mask_BN, (1, 0), value=True)
        if len(states) == 1:
            [x], [at], runs = states, places, None
        else:
            runs = Runs.of(states)
            x, at = runs.pack(states), runs.pack(places)
        for block in self.blocks:
            x = block(x, at, mask_BN, runs)
        states = [x] if runs is None else runs.unpack(x)
        return [x[:, 1:] for x in states] if self.task_tokens is not None else states
