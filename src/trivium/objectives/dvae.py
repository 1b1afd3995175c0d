"""The two terms of DALL-E's discrete VAE (Ramesh et al., arXiv 2102.12092, A.2 and A.3), and its relaxed codes.

B rows, C channels, H height, W width, K codes, h and w the grid of codes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def logit_laplace(location_BCHW: Tensor, log_scale_BCHW: Tensor, mapped_BCHW: Tensor) -> Tensor:
    """Negative log-density of pixels under a Laplace distribution of their logits, summed over all of them; nats.

    With x a pixel mapped into (0, 1), mu the location and b the scale (A.3, equation of f):

        -ln f(x | mu, b) = ln(2 b) + ln(x (1 - x)) + |logit(x) - mu| / b

    A density: it falls below 0, and without bound where a network learns pixels exactly.

    Args:
        mapped_BCHW: pixels in [0.1, 0.9] (see `models.dvae.map_pixels`): at 0 and 1 the logit has no value.
    """
    logits_BCHW = torch.logit(mapped_BCHW)
    jacobian_BCHW = (mapped_BCHW * (1 - mapped_BCHW)).log()
    distance_BCHW = (logits_BCHW - location_BCHW).abs() * (-log_scale_BCHW).exp()
    return (math.log(2) + log_scale_BCHW + jacobian_BCHW + distance_BCHW).sum()


def kl_to_uniform(logits_BKhw: Tensor) -> Tensor:
    """KL divergence of softmax(logits) from the uniform distribution over K codes, summed over positions; nats.

    Between 0 (knows nothing) and ln K (is certain) at each position. Without noise or temperature, as in the paper.
    """
    log_share_BKhw = F.log_softmax(logits_BKhw, dim=1)
    num_positions = logits_BKhw[:, 0].numel()
    return (log_share_BKhw.exp() * log_share_BKhw).sum() + num_positions * math.log(logits_BKhw.shape[1])


def gumbel_softmax(logits_BKhw: Tensor, noise_BKhw: Tensor, temperature: float) -> Tensor:
    """Relaxed one-hot codes, softmax((logits + noise) / temperature) over K (Jang et al. 2017; Maddison et al. 2017).

    Relaxed in the backward pass and in the forward pass too: no straight-through estimate.

    Args:
        noise_BKhw: independent draws of the standard Gumbel distribution, -ln of an exponential.
    """
    return ((logits_BKhw + noise_BKhw) / temperature).softmax(1)
