"""What one step of the dVAE does: its schedules, its noise, its average, its counts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.flava_batches import split
from trivium.invariance import dvae
from trivium.methods import dvae as module
from trivium.methods.dvae import Annealing, DVaeMethod, gumbel_noise, perplexity
from trivium.models.dvae import map_pixels
from trivium.objectives.dvae import kl_to_uniform, logit_laplace
from trivium.train.protocol import Key
from trivium.train.step import backward, measure, step

KEY = Key(0, "images", 30)


def optimizer_of(method: DVaeMethod) -> torch.optim.AdamW:
    return torch.optim.AdamW(method.model.parameters(), lr=1e-3)


# ---------------------------------------------------------------------------------------------- schedules


def test_the_published_annealing() -> None:
    """Ramesh et al., A.2: temperature 1 to 1/16 over 150,000 updates, KL weight 0 to 6.6 over 5,000, along cosines."""
    annealing, num_steps = Annealing(), 3_000_000
    assert annealing.temperature_at(0, num_steps) == 1
    assert annealing.temperature_at(75_000, num_steps) == pytest.approx((1 + 1 / 16) / 2)
    assert annealing.temperature_at(150_000, num_steps) == annealing.temperature_at(10**6, num_steps) == 1 / 16
    assert annealing.kl_weight_at(0, num_steps) == 0
    assert annealing.kl_weight_at(2_500, num_steps) == pytest.approx(3.3)
    assert annealing.kl_weight_at(5_000, num_steps) == annealing.kl_weight_at(9_999, num_steps) == 6.6


@given(share=st.floats(0.01, 0.99), num_steps=st.integers(10, 10_000))
def test_a_length_below_one_is_a_share_of_the_run(share: float, num_steps: int) -> None:
    annealing = Annealing(temperature_length=share, kl_length=share)
    values = [annealing.temperature_at(step, num_steps) for step in range(0, num_steps + 1, max(1, num_steps // 50))]
    assert values == sorted(values, reverse=True)
    assert values[0] == 1
    end = math.ceil(share * num_steps)
    assert annealing.temperature_at(end, num_steps) == pytest.approx(1 / 16)
    assert annealing.kl_weight_at(end, num_steps) == pytest.approx(6.6)
    assert annealing.kl_weight_at(end, num_steps) > annealing.kl_weight_at(end // 2, num_steps)


def test_the_kl_weight_may_fall_instead_of_rise() -> None:
    """First all codes are kept in use, then they may say more."""
    annealing = Annealing(start_kl_weight=4.0, kl_weight=1.0, kl_length=0.5)
    assert [annealing.kl_weight_at(step, 100) for step in (0, 25, 50, 99)] == pytest.approx([4.0, 2.5, 1.0, 1.0])


def test_the_kl_of_a_position_weighs_as_published() -> None:
    """Both terms of a picture are divided by its 3 x 256 x 256 numbers; 32 x 32 positions share the KL (A.2)."""
    model = dvae.random_dvae(replace(dvae.TINY, num_groups=4))
    method = DVaeMethod(model, Annealing(), num_steps=3_000_000)
    method.schedule(5_000)
    assert method.weights["kl"] == pytest.approx(6.6 * 32**2 / (3 * 256**2))
    counts = method.counts(dvae.make_batch(2, size=256))
    assert counts["likelihood"] == 2 * 3 * 256**2
    assert counts["kl"] == 2 * 32**2


# ------------------------------------------------------------------------------------------ noise and codes


def test_noise_is_a_function_of_the_row_of_the_global_batch_and_the_step() -> None:
    logits = torch.zeros(6, 5, 2, 2)
    rows = torch.arange(6)
    whole = gumbel_noise(KEY, rows, logits)
    assert torch.equal(gumbel_noise(KEY, rows[4:], logits[4:]), whole[4:])
    assert torch.equal(gumbel_noise(KEY, rows.flip(0), logits), whole.flip(0))
    assert not torch.equal(gumbel_noise(replace(KEY, step=31), rows, logits), whole)
    assert len(set(whole[:, 0, 0, 0].tolist())) == 6
    torch.manual_seed(1)
    assert torch.equal(gumbel_noise(KEY, rows, logits), whole)


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel_noise(KEY, torch.arange(200), torch.zeros(200, 50, 5, 5))
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)


def test_training_relaxes_and_evaluation_takes_the_likeliest_codes_of_the_average() -> None:
    method, batch = dvae.case(torch.float64, 0.0)
    found = measure(method, [[batch]], KEY)
    average = method.average
    mapped = map_pixels(batch.images[0].pixels_BCHW.double() / 255)
    with torch.no_grad():
        logits = average.encoder(mapped)
        hard = F.one_hot(logits.argmax(1), average.num_codes).permute(0, 3, 1, 2).double()
        location, log_scale = average.decoder(hard).chunk(2, 1)
    assert found["likelihood"] == pytest.approx(float(logit_laplace(location, log_scale, mapped)) / mapped.numel())
    assert found["kl"] == pytest.approx(float(kl_to_uniform(logits)) / logits[:, 0].numel())
    assert measure(method, [split(batch, 4)], replace(KEY, step=99)) == pytest.approx(found)  # no noise at all
    trained = backward(method.train(), [batch], KEY)[0]
    assert float(trained["likelihood"]) / mapped.numel() != pytest.approx(found["likelihood"], rel=1e-3)


def test_a_log_scale_is_held_above_its_floor_and_has_no_gradient_below() -> None:
    free, batch = dvae.case(torch.float64, 0.0)
    held, _ = dvae.case(torch.float64, 0.0, least_log_scale=-1e3)
    assert float(backward(held, [batch], KEY)[0]["likelihood"]) == float(backward(free, [batch], KEY)[0]["likelihood"])
    high, _ = dvae.case(torch.float64, 0.0, least_log_scale=1e3)
    backward(high, [batch], KEY)
    head = high.model.decoder.head
    assert not head.weight.grad[3:].any()
    assert free.model.decoder.head.weight.grad[3:].any()


# ------------------------------------------------------------------------------------- average and usage


def test_the_average_follows_after_each_accepted_step_and_is_what_is_exported() -> None:
    method, batch = dvae.case(torch.float64, 0.0, average=0.9)
    before = {name: tensor.clone() for name, tensor in method.average.state_dict().items()}
    assert step(method, [batch], KEY, optimizer_of(method)).accepted
    assert method.exported() is method.average
    newest = method.model.state_dict()
    for name, tensor in method.average.state_dict().items():
        assert torch.allclose(tensor, 0.9 * before[name] + 0.1 * newest[name], atol=1e-12)


def test_a_refused_step_changes_neither_weights_nor_average() -> None:
    method, batch = dvae.case(torch.float64, 0.0)
    with torch.no_grad():
        method.model.decoder.head.bias[0] = torch.inf
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    assert not step(method, [batch], KEY, optimizer_of(method)).accepted
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())
    assert method.usage.isnan()


def test_usage_is_the_perplexity_of_the_codes_of_the_whole_batch() -> None:
    whole, batch = dvae.case(torch.float64, 0.0)
    parts, _ = dvae.case(torch.float64, 0.0)
    codes = whole.model.frozen(torch.float64).encode(batch.images[0].pixels_BCHW.double() / 255)
    whole.model.requires_grad_(True)
    share = codes.flatten().bincount(minlength=13) / codes.numel()
    expected = math.exp(-sum(p * math.log(p) for p in share.tolist() if p))
    for method, batches in ((whole, [batch]), (parts, split(batch, 4))):
        step(method, batches, KEY, optimizer_of(method))
        assert float(method.usage) == pytest.approx(expected / 13)
        assert method.watched()["codebook_usage"].value is method.usage


def test_twins_of_frequent_codes_leave_the_network_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the noise: without it, logits of a code become two that sum to its share, and pictures stay."""
    method, batch = dvae.case(torch.float64, 0.0)
    model = method.model.requires_grad_(False)
    mapped = map_pixels(batch.images[0].pixels_BCHW.double() / 255)

    counts = torch.tensor([50.0, 0, 0, 40, 10, 10, 10, 10, 10, 10, 0, 10, 10])  # 1, 2 and 10 are not used
    features = torch.rand(13, model.encoder.head.in_channels, dtype=torch.float64) * counts[:, None]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected_share = model.logits(mapped).softmax(1)
    expected_share[:, [1, 2, 10]] = 0
    expected_share /= expected_share.sum(1, keepdim=True)
    expected_picture = torch.cat(model.distribution(expected_share), dim=1)
    with monkeypatch.context() as patched:
        patched.setattr(module, "TWIN_NOISE", 0.0)
        assert module.split_codes([model], counts, features, seed=1) == 3
    share = model.logits(mapped).softmax(1)
    for frequent, twin in ((0, 1), (3, 2), (4, 10)):
        assert torch.allclose(share[:, frequent], expected_share[:, frequent] / 2, atol=1e-12)
        assert torch.equal(share[:, frequent], share[:, twin])
    assert torch.allclose(torch.cat(model.distribution(share), dim=1), expected_picture, atol=1e-9)
    model.load_state_dict(before)
    module.split_codes([model], counts, features, seed=1)
    head = model.encoder.head.weight
    assert not torch.allclose(head[0], head[1])
    assert torch.allclose((head[0] + head[1]) / 2, before["encoder.head.weight"][0])
    mean = (features[0] / counts[0])[None, :, None, None]
    twins = model.encoder.head(mean)[0, [0, 1], 0, 0]
    expected = (before["encoder.head.weight"][0] * mean[0]).sum() + before["encoder.head.bias"][0] - math.log(2)
    assert torch.allclose(twins, expected)  # where the code is chosen on the mean, neither twin is ahead
    untouched = [4, 5, 6, 7, 8, 9, 11, 12]
    assert sum(torch.equal(head[code], before["encoder.head.weight"][code]) for code in untouched) == 7  # one was split


def test_a_run_splits_at_its_steps_and_keeps_its_counts() -> None:
    method, batch = dvae.case(torch.float64, 0.0, split_every=2)
    optimizer = optimizer_of(method)
    step(method, [batch], replace(KEY, step=30), optimizer)
    assert int(method.counts_K.sum()) == 16 * 9
    assert "counts_K" in method.state_dict()  # a run that resumes splits as one that was never stopped
    unused = int((method.counts_K == 0).sum())
    assert unused
    step(method, [batch], replace(KEY, step=31), optimizer)
    assert not method.counts_K.any()
    assert not method.features_KD.any()
    for model in (method.model, method.average):
        assert len(model.decoder.stem.weight[:, :, 0, 0].detach().unique(dim=1).T) < 13  # twins are read alike
    late, _ = dvae.case(torch.float64, 0.0, split_every=2)
    step(late, [batch], replace(KEY, step=91), optimizer_of(late))  # after 0.9 of 100 steps
    assert len(late.model.decoder.stem.weight[:, :, 0, 0].detach().unique(dim=1).T) == 13


def test_codes_are_split_alike_in_any_micro_batch() -> None:
    """Two steps, the second of which splits: weights of both models, whatever the global batch is cut into."""
    found = []
    for parts in (1, 2, 8):
        method, batch = dvae.case(torch.float64, 0.0, split_every=2)
        optimizer = optimizer_of(method)
        for number in (30, 31):
            assert step(method, split(batch, parts), replace(KEY, step=number), optimizer).accepted
        assert not method.counts_K.any()
        found.append({name: tensor.clone() for name, tensor in method.state_dict().items()})
    unsplit, batch = dvae.case(torch.float64, 0.0)
    optimizer = optimizer_of(unsplit)
    for number in (30, 31):
        step(unsplit, [batch], replace(KEY, step=number), optimizer)
    name = "model.encoder.head.weight"
    assert not torch.allclose(unsplit.state_dict()[name], found[0][name], rtol=0, atol=1e-3)
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert torch.allclose(other[name], tensor, rtol=0, atol=1e-9), name


def test_both_twins_are_chosen() -> None:
    """Features are never negative, so a plane through zero would leave one twin nothing."""
    torch.manual_seed(0)
    method, _ = dvae.case(torch.float64, 0.0)
    head = method.model.encoder.head.requires_grad_(False)
    features_PD = torch.rand(500, head.in_channels, dtype=torch.float64) + 1
    codes_P = head(features_PD[..., None, None])[..., 0, 0].argmax(1)
    counts_K = codes_P.bincount(minlength=13).double()
    frequent = int(counts_K.argmax())
    features_KD = torch.zeros(13, head.in_channels, dtype=torch.float64).index_add_(0, codes_P, features_PD)
    module.split_codes([method.model], counts_K, features_KD, seed=1)
    after_K = head(features_PD[..., None, None])[..., 0, 0].argmax(1).bincount(minlength=13)
    twins = [code for code in range(13) if code == frequent or counts_K[code] == 0]
    shares = (after_K[twins] / counts_K[frequent]).tolist()
    assert sum(share > 0.2 for share in shares) >= 2


def test_perplexity_counts_evenly_used_codes() -> None:
    assert float(perplexity(torch.tensor([5.0, 0, 5, 5, 0]))) == pytest.approx(3)
    assert float(perplexity(torch.tensor([7.0, 0, 0]))) == pytest.approx(1)


def test_bfloat16_leaves_the_ends_in_full_precision() -> None:
    method, batch = dvae.case(torch.float32, 0.0)
    mapped = map_pixels(batch.images[0].pixels_BCHW / 255)
    with torch.autocast("cpu", torch.bfloat16):
        assert method.model.encoder.features(mapped).dtype == torch.bfloat16
        logits = method.model.logits(mapped)
        location, log_scale = method.model.distribution(logits.softmax(1))
    assert logits.dtype == location.dtype == log_scale.dtype == torch.float32
    assert torch.allclose(logits, method.model.encoder(mapped), atol=0.1)
    assert not torch.equal(logits, logits.bfloat16().float())
