"""Zero-shot classification (CLIP, Radford et al. 2021, section 3.1): a class is what its name looks like as text.

    vector of a class = normalise(mean over its prompts of normalise(encode(prompt)));  answer = the nearest class

B pictures, K classes, P prompts of a class, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

TEMPLATES = ("{}", "a picture of {}", "a drawing of {}")
OF_PHOTOGRAPHS = ("a photo of {}.", "a close-up photo of {}.", "a blurry photo of {}.", "{}")


def prompts(names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[str]:
    """The prompts of a class, each of whose names goes where a template has {} or {c}."""
    return [template.replace("{c}", name).replace("{}", name) for name in names for template in templates]


def class_vectors(
    names: Sequence[tuple[str, ...]], encode: Callable[[list[str]], Tensor], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """One vector of unit length per class, [K, D].

    Args:
        names: of each class, one or several.
        encode: texts -> [number of texts, D], in the space that images and texts share. Called once for all prompts.
    """
    of_class = [prompts(name, templates) for name in names]
    vectors = normalize(encode([prompt for group in of_class for prompt in group]), dim=-1)
    means = [part.mean(dim=0) for part in vectors.split([len(group) for group in of_class])]
    return normalize(torch.stack(means), dim=-1)


def predict(images_BD: Tensor, classes_KD: Tensor) -> Tensor:
    """The nearest class by cosine, int64 [B]."""
    return _cosines(images_BD, classes_KD).argmax(dim=1)


def among_nearest(images_BD: Tensor, classes_KD: Tensor, labels_B: Tensor, count: int) -> Tensor:
    """Whether the right class is among the `count` nearest, bool [B]. Classes as near as it stand before it, and where
    cosines are no numbers it is not."""
    cosines_BK = _cosines(images_BD, classes_KD)
    own_B1 = cosines_BK.gather(1, labels_B[:, None])
    return (~(cosines_BK < own_B1)).sum(dim=1) <= count


def _cosines(images_BD: Tensor, classes_KD: Tensor) -> Tensor:
    return normalize(images_BD, dim=-1) @ classes_KD.T
