"""Training of DALL-E's discrete VAE (Ramesh et al., arXiv 2102.12092, A.2 and A.3): the image tokenizer of FLAVA.

Encoder, relaxed codes, decoder; a likelihood of the pixels and a KL term that holds the codes near uniform. Easy to get
wrong:

* both terms of a picture are divided by its numbers, 3 * H * W: so the KL of one position weighs
  kl_weight / (3 * stride^2), 6.6 / 192 as published. Without that weight the codebook collapses;
* the noise and the temperature enter the decoder's input, never the KL;
* the logits and what the decoder makes of codes first are computed in float32 whatever the precision, as published.

B rows, C channels, H height, W width, K codes, D features that logits are made of, h and w the grid of codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trivium.methods.momentum import follow, follower
from trivium.methods.pixels import MethodOfPictures, Pixels
from trivium.models.dvae import DVae, map_pixels
from trivium.objectives.dvae import gumbel_softmax, kl_to_uniform, logit_laplace
from trivium.train.protocol import Batch, Key, Rows, Sums, Watched, hash64

LOSSES = ("likelihood", "kl")
# Of splitting codes: until which share of the run; below and above which share, in units of even use, a code is given
# away or split; and how far twins are set apart, in units of the deviation of a code's weights.
SPLIT_UNTIL, UNUSED, FREQUENT, TWIN_NOISE = 0.9, 0.02, 0.5, 0.1


@dataclass(frozen=True)
class Annealing:
    """How sharp the codes are and how much the KL weighs, as functions of the step; both change along a cosine.

    A length is a number of steps; below 1 a share of all of them. The defaults are the published ones.
    """

    start_temperature: float = 1.0
    temperature: float = 1 / 16  # at the end of its length and after it
    temperature_length: float = 150_000
    start_kl_weight: float = 0.0
    kl_weight: float = 6.6  # at the end of its length and after it
    kl_length: float = 5_000

    def temperature_at(self, step: int, num_steps: int) -> float:
        return _cosine(self.start_temperature, self.temperature, step, _steps(self.temperature_length, num_steps))

    def kl_weight_at(self, step: int, num_steps: int) -> float:
        return _cosine(self.start_kl_weight, self.kl_weight, step, _steps(self.kl_length, num_steps))


def _steps(length: float, num_steps: int) -> float:
    return length * num_steps if length < 1 else length


def _cosine(start: float, end: float, step: int, length: float) -> float:
    done = min(1.0, step / length) if length else 1.0
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


class DVaeMethod(MethodOfPictures):
    """Encoder, decoder and the average of both, which is what is kept.

    In eval mode the average is measured as it is used: every code the likeliest one, no noise, no relaxation.

    Args:
        model: with a decoder.
        num_steps: of the whole run, which some lengths are shares of.
        average: momentum of the average of the weights. 0.999 as published, for runs of millions of steps.
        least_log_scale: the decoder's log-scales are held above it; None as published. Pixels that a drawing repeats
            without noise, its white paper, can be learned exactly: their density has no bound, and a gradient that
            grows with it drowns all others.
        split_every: steps between splittings of codes (see `split_codes`), during the first SPLIT_UNTIL of the run;
            0 = never, as published. Short runs lose most codes in their first hundreds of steps and never win them
            back.
    """

    model: DVae
    average: DVae
    usage: Tensor
    counts_K: Tensor
    features_KD: Tensor

    def __init__(
        self,
        model: DVae,
        annealing: Annealing,
        num_steps: int,
        average: float = 0.999,
        least_log_scale: float | None = None,
        split_every: int = 0,
    ) -> None:
        super().__init__(Pixels(mean=(0.0,) * 3, std=(1.0,) * 3))  # the tokenizer reads pixels in [0, 1]
        assert model.decoder is not None, "nothing can be learned without a decoder"
        self.model = model
        self.average = follower(model)
        self.annealing = annealing
        self.num_steps = num_steps
        self.momentum = average
        self.least_log_scale = least_log_scale
        self.split_every = split_every
        head = model.encoder.head  # counted since the last one:
        self.register_buffer("counts_K", torch.zeros(head.out_channels) if split_every else None)
        self.register_buffer("features_KD", torch.zeros(head.weight.shape[:2]) if split_every else None)
        self.weights = dict.fromkeys(LOSSES, 1.0)
        self.register_buffer("usage", torch.full((), torch.nan), persistent=False)  # of the last step, to be watched
        self.schedule(0)

    def exported(self) -> DVae:
        return self.average

    def schedule(self, step: int) -> None:
        self.temperature = self.annealing.temperature_at(step, self.num_steps)
        self.weights["kl"] = self.annealing.kl_weight_at(step, self.num_steps) / (3 * self.model.stride**2)

    def counts(self, batch: Batch) -> Sums:
        pixels_BCHW = batch.images[0].pixels_BCHW
        numbers = torch.tensor(pixels_BCHW.numel())
        return {"likelihood": numbers, "kl": numbers // (3 * self.model.stride**2)}

    def separate(self, batch: Batch, rows: Rows, states: Any, counts: Sums, key: Key) -> Sums:
        model = self.model if self.training else self.average
        mapped_BCHW = map_pixels(self.pixels(batch.images[0].pixels_BCHW))
        features_BDhw = model.features(mapped_BCHW)
        logits_BKhw = model.logits_of(features_BDhw)
        codes_Bhw = logits_BKhw.argmax(1)
        if self.training:
            noise_BKhw = gumbel_noise(key, batch.rows_B, logits_BKhw)
            soft_BKhw = gumbel_softmax(logits_BKhw, noise_BKhw, self.temperature)
        else:
            soft_BKhw = F.one_hot(codes_Bhw, model.num_codes).permute(0, 3, 1, 2).to(logits_BKhw)
        location_BCHW, log_scale_BCHW = model.distribution(soft_BKhw)
        if self.least_log_scale is not None:
            log_scale_BCHW = log_scale_BCHW.clamp(min=self.least_log_scale)
        sums = {
            "likelihood": logit_laplace(location_BCHW, log_scale_BCHW, mapped_BCHW.to(location_BCHW)),
            "kl": kl_to_uniform(logits_BKhw),
            "stat/codes": codes_Bhw.flatten().bincount(minlength=model.num_codes).to(logits_BKhw),
        }
        if self.split_every:
            rows_PD = features_BDhw.detach().permute(0, 2, 3, 1).flatten(0, 2)
            zeros_KD = rows_PD.new_zeros(self.features_KD.shape)
            sums["stat/features"] = zeros_KD.index_add_(0, codes_Bhw.flatten(), rows_PD)
        return sums

    def after_step(self, step: int, everyone: Rows, stats: Sums) -> None:
        follow(self.average, self.model, self.momentum)
        self.usage.copy_(perplexity(stats["stat/codes"]) / self.model.num_codes)
        if self.split_every:
            self.counts_K += stats["stat/codes"].to(self.counts_K)
            self.features_KD += stats["stat/features"].to(self.features_KD)
            if (step + 1) % self.split_every == 0:
                if step < SPLIT_UNTIL * self.num_steps:
                    split_codes((self.model, self.average), self.counts_K, self.features_KD, step)
                self.counts_K.zero_()
                self.features_KD.zero_()

    def watched(self) -> dict[str, Watched]:
        return {
            "codebook_usage": Watched(
                self.usage, 0.05, 1.0,
                "few of the codes stand for nearly all patches (perplexity of the codes of a batch, as a share of all):"
                " raise --annealing.kl-weight, or take fewer codes",
            )
        }  # fmt: skip


def gumbel_noise(key: Key, rows_B: Tensor, logits_BKhw: Tensor) -> Tensor:
    """Draws of the standard Gumbel distribution, a function of (seed, stream, step, row of the global batch) alone."""
    noise_BKhw = torch.empty_like(logits_BKhw, dtype=torch.float32, memory_format=torch.contiguous_format)
    generator = torch.Generator(noise_BKhw.device)
    for row, noise_Khw in zip(rows_B.tolist(), noise_BKhw, strict=True):
        generator.manual_seed(hash64(key.seed, key.stream, key.step, "gumbel", row) % 2**63)
        noise_Khw.exponential_(generator=generator)
    return noise_BKhw.log_().neg_().to(logits_BKhw.dtype)


@torch.no_grad()
def split_codes(models: Sequence[DVae], counts_K: Tensor, features_KD: Tensor, seed: int) -> int:
    """Give codes that are not used to places that are: each becomes the twin of a frequent one. Returns how many.

    The twins' logits are the frequent code's less ln 2, and the decoder reads both alike: what the network computes
    stays as it was, but for a little noise that sets the twins apart, and from there on they may learn different
    things. The noise is a plane through the mean of the features at which the code was chosen, so that each twin gets a
    part of them: features are never negative, and about a plane through zero one twin takes all and the other dies. How
    vector quantizers have been grown since Linde, Buzo and Gray (1980).

    Adam's moments of the places that are given away are kept, on purpose. The first forgets the former code within
    tens of steps. The second, of a code of which little was asked, is small, so the new twin moves faster at first, by
    (1 - b1) / sqrt(1 - b2) times the rate a step at most, 3.2 at (0.9, 0.999): away from the other, as it should.

    Args:
        models: the one that is trained and its average, in which the place of a code that is given away means nothing.
        counts_K: how often each code was the likeliest, in the first of them.
        features_KD: the sum of the features there.
        seed: of the noise.
    """
    share_K = counts_K * len(counts_K) / counts_K.sum().clamp(min=1)  # 1 = as often as all would be, used evenly
    unused = (share_K < UNUSED).nonzero()[:, 0]
    frequent = share_K.argsort(descending=True, stable=True)
    frequent = frequent[share_K[frequent] > FREQUENT]
    num_split = min(len(unused), len(frequent))
    if not num_split:
        return 0
    unused, frequent = unused[:num_split], frequent[:num_split]
    weights = models[0].encoder.head.weight[frequent]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(weights.shape, generator=generator).to(weights)
    noise *= TWIN_NOISE * weights.std((1, 2, 3), keepdim=True)
    at_mean = (noise[:, :, 0, 0] * features_KD[frequent] / counts_K[frequent, None]).sum(1)
    for model in models:
        assert model.decoder is not None
        head, codebook = model.encoder.head, model.decoder.stem.weight
        assert head.bias is not None
        weights, bias = head.weight[frequent], head.bias[frequent] - math.log(2)
        head.weight[unused], head.weight[frequent] = weights + noise, weights - noise
        head.bias[unused], head.bias[frequent] = bias - at_mean, bias + at_mean
        codebook[:, unused] = codebook[:, frequent]
    return num_split


def perplexity(counts_K: Tensor) -> Tensor:
    """How many codes are used as evenly as these: e to the entropy of their shares. Between 1 and K."""
    share_K = counts_K / counts_K.sum()
    return torch.special.entr(share_K).sum().exp()
