"""The dVAE's training loss and every gradient of it, against DALL-E's network written out from its paper and its names.

No library holds the training of DALL-E's dVAE, so the oracle is a plain construction: functional convolutions over a
state dict under DALL-E's names, torch's distributions for the likelihood and the KL, torch's own Gumbel-softmax.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from torch import Tensor
from torch.distributions import Categorical, Laplace, SigmoidTransform, TransformedDistribution, kl_divergence
from torch.nn import functional as F

from tests.flava_batches import assert_close, gradients
from trivium.convert import dalle
from trivium.invariance import dvae
from trivium.methods.dvae import Annealing, gumbel_noise
from trivium.models.dvae import DVae, DVaeConfig, map_pixels
from trivium.train.protocol import Key
from trivium.train.step import backward

KEY = Key(3, "images", 40)


def plain_network(state: dict[str, Tensor], x: Tensor, config: DVaeConfig, part: str) -> Tensor:
    """DALL-E's encoder or decoder (Ramesh et al., A.2), read from its weights."""

    def conv(name: str, x: Tensor) -> Tensor:
        weight = state[f"blocks.{name}.w"]
        return F.conv2d(x, weight, state[f"blocks.{name}.b"], padding=(weight.shape[-1] - 1) // 2)

    num_blocks = config.num_groups * config.blocks_per_group
    x = conv("input", x)
    for group in range(1, config.num_groups + 1):
        for block in range(1, config.blocks_per_group + 1):
            name = f"group_{group}.block_{block}"
            path = x
            for n in range(1, 5):
                path = conv(f"{name}.res_path.conv_{n}", path.relu())
            x = conv(f"{name}.id_path", x) if f"blocks.{name}.id_path.w" in state else x
            x = x + path / num_blocks**2
        if group < config.num_groups:
            x = F.max_pool2d(x, 2) if part == "encoder" else x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return conv("output.conv", x.relu())


def plain_loss(encoder: dict[str, Tensor], decoder: dict[str, Tensor], pixels: Tensor, noise: Tensor,
               config: DVaeConfig, temperature: float, kl_weight: float) -> Tensor:  # fmt: skip
    """Mean over pictures of (likelihood + kl_weight x KL) / (3 H W), A.2 and A.3."""
    mapped = 0.8 * pixels + 0.1
    logits = plain_network(encoder, mapped, config, "encoder")
    soft = F.softmax((logits + noise) / temperature, dim=1)
    location, log_scale = plain_network(decoder, soft, config, "decoder").split(3, dim=1)
    density = TransformedDistribution(Laplace(location, log_scale.exp()), [SigmoidTransform()])
    q = Categorical(logits=logits.permute(0, 2, 3, 1))
    kl = kl_divergence(q, Categorical(logits=torch.zeros_like(q.logits)))
    return (-density.log_prob(mapped).sum() + kl_weight * kl.sum()) / mapped.numel()


def as_dalle(model: DVae, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values by our parameters' names -> by DALL-E's, encoder and decoder apart."""
    copy = DVae(model.config).to(next(iter(values.values())).dtype)
    copy.load_state_dict(values)
    parts = {part: dalle.to_dalle(copy, part) for part in ("encoder", "decoder")}
    return {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}


@pytest.mark.parametrize("config", [dvae.TINY, replace(dvae.TINY, num_groups=2, blocks_per_group=2)])
def test_loss_and_gradients_agree_to_nine_digits(config: DVaeConfig) -> None:
    annealing = Annealing(temperature_length=0.5, kl_length=0.6)
    method = dvae.dvae_method(dvae.random_dvae(config), annealing)
    batch = dvae.make_batch(5)
    pixels = batch.images[0].pixels_BCHW.double() / 255
    noise = gumbel_noise(KEY, batch.rows_B, method.model.encoder(map_pixels(pixels)).detach())

    sums, counts, _ = backward(method.train(), [batch], KEY)
    mine = sum(method.weights[name] * sums[name] / counts[name] for name in ("likelihood", "kl"))

    state = {name: tensor.detach() for name, tensor in method.model.state_dict().items()}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in as_dalle(method.model, state).items()}
    parts = [{n.removeprefix(f"{p}."): t for n, t in leaves.items() if n.startswith(p)} for p in ("encoder", "decoder")]
    kl_weight = method.weights["kl"] * 3 * config.stride**2
    assert 0 < kl_weight < 6.6
    expected = plain_loss(*parts, pixels, noise, config, method.temperature, kl_weight)
    expected.backward()

    assert float(mine) == pytest.approx(float(expected.detach()), rel=1e-9)
    reference = {name: tensor.grad for name, tensor in leaves.items() if tensor.grad is not None}
    assert_close(as_dalle(method.model, gradients(method.model)), reference, of_largest=1e-9)


def test_the_plain_encoder_is_that_of_hugging_face() -> None:
    """The oracle itself against the one part that a library has."""
    config = transformers.FlavaImageCodebookConfig(hidden_size=8, vocab_size=11, num_blocks_per_group=1)
    peer = transformers.FlavaImageCodebook(config).double()
    ours = dalle.from_dalle(dict(peer.state_dict())).double()
    pixels = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = peer(pixels)
        assert torch.allclose(plain_network(dalle.to_dalle(ours), pixels, ours.config, "encoder"), expected, atol=1e-12)
