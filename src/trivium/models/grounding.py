"""Where in a picture a model looks for the words of a text: attention, times what it does for the score (Grad-CAM).

Of one block's attention A from words to patches, and the score S of "belong together" (ALBEF, section 4.4 and figure 4;
Selvaraju et al. 2017):

    heat = mean over heads of A * relu(dS / dA)

Easy to get wrong: A is what the softmax gives, before any dropout; the class token of the picture is no patch; dS / dA
of a row asks for the score of that row alone, so scores of a batch are summed. In the last block the score reads the
first token alone: there all words are cold.

B batch, H heads, Q queries, L keys, T text tokens, P patches, D width, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from trivium.layers.attention import Attention
from trivium.models.encoded import Encoded, EncodesImage, Matches


@dataclass(frozen=True)
class Gaze:
    """The attention of one block of fusion: which of its queries are the text, which of its keys the patches."""

    attention: Attention
    text: slice
    patches: slice


@runtime_checkable
class Grounds(Matches, Protocol):
    """A model whose words attend patches, and that judges whether both belong together."""

    def gaze(self, num_patches: int, block: int | None = None) -> Gaze:
        """block: which one of those that fuse, from 0; None: the one that is usually looked at. Raises IndexError."""
        ...


@runtime_checkable
class Compares(EncodesImage, Protocol):
    """A model that compares picture and text by the cosine of their class tokens."""

    def image_attention(self, block: int | None = None) -> Attention:
        """Of a block of the picture's tower, from 0; None: the last one. Raises IndexError."""
        ...


def word_heat(model: Grounds, image: Encoded, text: Encoded, block: int | None = None) -> Tensor:
    """How far each patch, as each token sees it, speaks for the pair: [B, T, P], not negative, 0 at pads.

    The mean over tokens is the heat of the whole text. `image` and `text` as the model encodes them, row by row; no
    weight of the model gets a gradient.
    """
    num_patches = image.states.shape[1] - 1
    gaze = model.gaze(num_patches, _from_first(block))
    with torch.enable_grad(), gaze.attention.watched() as seen:
        score = model.match(model.fuse(image, text))[:, 1].float().sum()
        [weights_BHQL] = seen
        [slope_BHQL] = torch.autograd.grad(score, [weights_BHQL])
    heat_BQL = _heat(weights_BHQL, slope_BHQL)
    heat_BTP = heat_BQL[:, gaze.text, gaze.patches]
    assert heat_BTP.shape[1:] == (text.states.shape[1], num_patches)
    return heat_BTP if text.mask is None else heat_BTP * text.mask[:, :, None]


def picture_heat(model: Compares, pixels_BCHW: Tensor, text_BD: Tensor, block: int | None = None) -> Tensor:
    """[B, P]: the same of the picture's own tower, as its class token attends patches for the cosine with each text.

    The temperature would only be a factor. text_BD: `projected` of the texts.
    """
    with torch.enable_grad(), model.image_attention(_from_first(block)).watched() as seen:
        score = (model.encode_image(pixels_BCHW).projected * text_BD).float().sum()
        [weights_BHLL] = seen
        [slope_BHLL] = torch.autograd.grad(score, [weights_BHLL])
    return _heat(weights_BHLL, slope_BHLL)[:, 0, 1:]


def _from_first(block: int | None) -> int | None:
    """Python would take a negative number for one counted from the last. Raises IndexError."""
    if block is not None and block < 0:
        raise IndexError(f"block {block}")
    return block


def _heat(weights_BHQL: Tensor, slope_BHQL: Tensor) -> Tensor:
    return (weights_BHQL.detach() * slope_BHQL.relu()).mean(1)
