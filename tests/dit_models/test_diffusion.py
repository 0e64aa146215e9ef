import math
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from dit_models.diffusion import DDPM, RectifiedFlow, noise_from_seeds
from dit_models.diffusion.ddpm import discretized_gaussian_nll, gaussian_kl

CHANNELS = 4


class Output(NamedTuple):
    sample: Tensor
    plans: tuple[str, ...] = ("plan",)


def images_and_noise(batch_size: int = 3, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(1)
    shape = (2, batch_size, CHANNELS, 4, 4)
    images, noise = torch.randn(shape, generator=generator, dtype=dtype)
    return images.clamp(-1, 1), noise


# noise


def test_noise_of_an_image_depends_on_its_seed_alone():
    together = noise_from_seeds([3, 1, 4, 1], (CHANNELS, 5, 7))
    assert together.shape == (4, CHANNELS, 5, 7)
    assert together.dtype == torch.float32
    for row, seed in zip(together, [3, 1, 4, 1], strict=True):
        assert torch.equal(row, noise_from_seeds([seed], (CHANNELS, 5, 7))[0])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("seed", [-1, 2**32, 5 + 2**32, 1.0, True])
def test_seed_that_would_repeat_another_seeds_noise_is_refused(seed):
    with pytest.raises(ValueError, match=r"\[0, 2\*\*32\), got"):
        noise_from_seeds([seed], (1, 2, 2))
    with pytest.raises(ValueError, match="empty"):
        noise_from_seeds([], (1, 2, 2))


# rectified flow


def test_flow_loss_is_the_squared_error_of_the_velocity():
    images, noise = images_and_noise()
    timesteps = torch.tensor([0.0, 0.25, 1.0])
    seen = []

    def denoise(x: Tensor, t: Tensor) -> Output:
        seen.append((x, t))
        return Output(x * 0.5)

    result = RectifiedFlow().loss_at(denoise, images, noise, timesteps)
    ((x, t),) = seen
    assert torch.equal(t, timesteps)
    assert torch.equal(x[0], images[0])
    assert torch.equal(x[2], noise[2])
    torch.testing.assert_close(x[1], 0.75 * images[1] + 0.25 * noise[1])
    expected = torch.stack([((0.5 * x[i] - (noise[i] - images[i])) ** 2).mean() for i in range(3)])
    torch.testing.assert_close(result.loss, expected)
    assert result.output.plans == ("plan",)


def test_flow_drops_the_variance_half_of_the_prediction():
    images, noise = images_and_noise()
    timesteps = torch.full((3,), 0.3)
    flow = RectifiedFlow()
    plain = flow.loss_at(lambda x, t: Output(x), images, noise, timesteps)
    doubled = flow.loss_at(
        lambda x, t: Output(torch.cat([x, x * math.nan], dim=1)), images, noise, timesteps
    )
    assert torch.equal(plain.loss, doubled.loss)
    assert flow.prediction_channels(CHANNELS) == CHANNELS
    with pytest.raises(ValueError, match="4 or 8 channels for images of 4, got 12"):
        flow.loss_at(lambda x, t: Output(torch.cat([x] * 3, 1)), images, noise, timesteps)


def test_flow_loss_repeats_with_its_generator():
    images, _ = images_and_noise()
    losses = [
        RectifiedFlow().loss(lambda x, t: Output(x), images, torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(losses[0].loss, losses[1].loss)
    assert torch.equal(losses[0].timesteps, losses[1].timesteps)
    assert not torch.equal(losses[0].timesteps, losses[2].timesteps)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 1.4)])
def test_logit_of_flow_timesteps_is_normal(mean, std):
    flow = RectifiedFlow(mean, std)
    t = flow.sample_timesteps(40_000, torch.Generator().manual_seed(0), torch.device("cpu"))
    logits = torch.logit(t.double())
    assert t.dtype == torch.float32
    assert logits.mean().item() == pytest.approx(mean, abs=4 * std / 200)
    assert logits.std().item() == pytest.approx(std, abs=4 * std / 283)
    tail = (logits > mean + 2 * std).double().mean().item()
    assert tail == pytest.approx(0.02275, abs=0.003)


def test_uniform_flow_timesteps_are_uniform():
    flow = RectifiedFlow(timestep_distribution="uniform")
    t = flow.sample_timesteps(40_000, torch.Generator().manual_seed(0), torch.device("cpu"))
    counts = torch.histc(t, 20, 0, 1)
    assert ((counts - 2000) ** 2 / 2000).sum() < 43.8  # chi-square, 19 degrees, p = 0.001


def test_flow_loss_gradient_matches_finite_differences():
    images, noise = images_and_noise(2, torch.float64)
    timesteps = torch.tensor([0.2, 0.8], dtype=torch.float64)
    weight = torch.randn(2 * CHANNELS, CHANNELS, dtype=torch.float64, requires_grad=True)

    def loss(w: Tensor) -> Tensor:
        denoise = lambda x, t: Output(torch.einsum("oc,bchw->bohw", w, x))  # noqa: E731
        return RectifiedFlow().loss_at(denoise, images, noise, timesteps).loss

    assert torch.autograd.gradcheck(loss, weight)


# DDPM


def test_ddpm_schedule_is_linear_in_beta():
    ddpm = DDPM()
    assert ddpm.betas[0].item() == 1e-4
    assert ddpm.betas[-1].item() == 2e-2
    torch.testing.assert_close(ddpm.betas.diff(), torch.full((999,), 1.99e-2 / 999).double())
    product = 1.0
    for step in range(1000):
        product *= 1 - (1e-4 + 1.99e-2 * step / 999)
    assert ddpm.alphas_cumprod[-1].item() == pytest.approx(product, rel=1e-11)


def test_ddpm_timesteps_are_uniform():
    ddpm = DDPM(num_timesteps=20)
    t = ddpm.sample_timesteps(40_000, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert t.dtype == torch.int64
    counts = torch.bincount(t, minlength=20).double()
    assert len(counts) == 20
    assert ((counts - 2000) ** 2 / 2000).sum() < 43.8  # chi-square, 19 degrees, p = 0.001


def test_predict_data_inverts_add_noise():
    images, noise = images_and_noise(4, torch.float64)
    timesteps = torch.tensor([0, 1, 500, 999])
    ddpm = DDPM()
    noisy = ddpm.add_noise(images, noise, timesteps)
    torch.testing.assert_close(ddpm.predict_data(noisy, noise, timesteps), images)


def test_posterior_is_bayes_rule_on_the_two_gaussians():
    # q(x_{t-1} | x_0) is the prior, q(x_t | x_{t-1}) the likelihood; precisions add.
    images, noisy = images_and_noise(3, torch.float64)
    timesteps = torch.tensor([1, 40, 999])
    ddpm = DDPM()
    mean, log_variance = ddpm.posterior(images, noisy, timesteps)
    for row, t in enumerate(timesteps.tolist()):
        previous, alpha = ddpm.alphas_cumprod[t - 1], 1 - ddpm.betas[t]
        precision = 1 / (1 - previous) + alpha / ddpm.betas[t]
        weighted = previous.sqrt() * images[row] / (1 - previous)
        weighted = weighted + alpha.sqrt() * noisy[row] / ddpm.betas[t]
        torch.testing.assert_close(mean[row], weighted / precision, rtol=1e-9, atol=1e-12)
        assert log_variance[row].item() == pytest.approx(-precision.log().item(), rel=1e-9)
    mean, log_variance = ddpm.posterior(images, noisy, torch.tensor([0, 0, 0]))
    torch.testing.assert_close(mean, images)
    assert log_variance[0].item() == ddpm.posterior(images, noisy, timesteps)[1][0].item()


def test_raw_variance_spans_beta_tilde_to_beta():
    ddpm = DDPM()
    t = torch.tensor([300])
    beta = ddpm.betas[300]
    beta_tilde = beta * (1 - ddpm.alphas_cumprod[299]) / (1 - ddpm.alphas_cumprod[300])
    for raw, expected in [(1.0, beta), (-1.0, beta_tilde), (0.0, (beta * beta_tilde).sqrt())]:
        value = ddpm.log_variance(torch.full((1, 1, 1, 1), raw, dtype=torch.float64), t)
        assert value.item() == pytest.approx(expected.log().item(), rel=1e-12)


def test_gaussian_kl_agrees_with_torch_distributions():
    mean_q, mean_p, log_q, log_p = torch.randn(4, 50, dtype=torch.float64)
    expected = kl_divergence(Normal(mean_q, (log_q / 2).exp()), Normal(mean_p, (log_p / 2).exp()))
    torch.testing.assert_close(gaussian_kl(mean_q, log_q, mean_p, log_p), expected)


def test_discretized_nll_is_the_probability_of_the_bin():
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    mean = torch.tensor(0.1, dtype=torch.float64)
    std = torch.tensor(0.2, dtype=torch.float64)
    nll = discretized_gaussian_nll(levels, mean, 2 * std.log())
    probabilities = torch.exp(-nll)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    normal = Normal(mean, std)
    expected = normal.cdf(levels + 1 / 255) - normal.cdf(levels - 1 / 255)
    torch.testing.assert_close(probabilities[1:-1], expected[1:-1], rtol=1e-6, atol=1e-13)
    edges = torch.stack([normal.cdf(levels[0] + 1 / 255), 1 - normal.cdf(levels[-1] - 1 / 255)])
    torch.testing.assert_close(probabilities[[0, -1]], edges, rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize("mean", [-30.0, 30.0])
def test_discretized_nll_is_finite_far_in_both_tails(mean):
    images = torch.linspace(-1, 1, 256).requires_grad_()
    nll = discretized_gaussian_nll(images, torch.tensor(mean), torch.tensor(-4.0))
    (gradient,) = torch.autograd.grad(nll, images, torch.randn(256))
    assert torch.isfinite(nll).all()
    assert torch.isfinite(gradient).all()
    # The log density at the near edge of the bin dominates: -(distance/std)^2 / 2, within 1 %.
    distance = (images.detach()[100] - mean).abs() - 1 / 255
    assert nll[100].item() == pytest.approx((distance**2 * math.exp(4) / 2).item(), rel=0.01)


def test_ddpm_loss_is_mse_plus_the_bound_in_bits():
    images, noise = images_and_noise(3, torch.float64)
    timesteps = torch.tensor([0, 1, 700])
    ddpm = DDPM(vb_weight=2e-3)
    prediction = torch.randn(3, 2 * CHANNELS, 4, 4, dtype=torch.float64)
    seen = []

    def denoise(x: Tensor, t: Tensor) -> Output:
        seen.append((x, t))
        return Output(prediction)

    result = ddpm.loss_at(denoise, images, noise, timesteps)
    ((x, t),) = seen
    assert t.dtype == result.timesteps.dtype == torch.float32
    assert t.tolist() == [0, 1, 700]
    for row, step in enumerate([0, 1, 700]):
        beta, bar = ddpm.betas[step], ddpm.alphas_cumprod[step]
        predicted, raw = prediction[row].chunk(2)
        torch.testing.assert_close(x[row], bar.sqrt() * images[row] + (1 - bar).sqrt() * noise[row])
        # DDPM eq. 11: the model's mean straight from the predicted noise.
        mean = (x[row] - beta / (1 - bar).sqrt() * predicted) / (1 - beta).sqrt()
        low = ddpm.posterior(images, x, timesteps)[1][row]
        std = (((raw + 1) / 2 * beta.log() + (1 - raw) / 2 * low) / 2).exp()
        if step == 0:
            term = discretized_gaussian_nll(images[row], mean, 2 * std.log()).mean()
        else:
            true_mean, log_variance = ddpm.posterior(images, x, timesteps)
            truth = Normal(true_mean[row], (log_variance[row] / 2).exp())
            term = kl_divergence(truth, Normal(mean, std)).mean()
        expected = ((predicted - noise[row]) ** 2).mean() + 2e-3 * 1000 * term / math.log(2)
        assert result.loss[row].item() == pytest.approx(expected.item(), rel=1e-6)


def test_bound_is_zero_for_the_true_posterior():
    images, noise = images_and_noise(2, torch.float64)
    ddpm, timesteps = DDPM(), torch.tensor([5, 900])
    noisy = ddpm.add_noise(images, noise, timesteps)
    raw = torch.full_like(noise, -1.0)
    bound = ddpm.variational_bound(images, noisy, timesteps, noise, raw)
    assert bound.abs().max() < 1e-12


def test_bound_trains_the_variance_and_not_the_mean():
    images, noise = images_and_noise()
    timesteps = torch.tensor([0, 10, 900])
    prediction = torch.randn(3, 2 * CHANNELS, 4, 4, requires_grad=True)
    upstream = torch.randn(3)

    def gradient(vb_weight: float) -> Tensor:
        ddpm = DDPM(vb_weight=vb_weight)
        loss = ddpm.loss_at(lambda x, t: Output(prediction), images, noise, timesteps).loss
        return torch.autograd.grad(loss, prediction, upstream)[0]

    with_bound, without = gradient(1e-3), gradient(0.0)
    assert torch.equal(with_bound[:, :CHANNELS], without[:, :CHANNELS])
    assert (without[:, CHANNELS:] == 0).all()
    assert (with_bound[:, CHANNELS:].abs().amax(dim=(1, 2, 3)) > 0).all()


def test_ddpm_loss_and_gradient_are_finite_at_every_timestep():
    ddpm = DDPM()
    generator = torch.Generator().manual_seed(0)
    images, noise = 3 * torch.randn(2, 1000, 1, 2, 2, generator=generator)
    prediction = torch.randn(1000, 2, 2, 2, generator=generator).requires_grad_()
    result = ddpm.loss_at(lambda x, t: Output(prediction), images, noise, torch.arange(1000))
    (gradient,) = torch.autograd.grad(result.loss, prediction, torch.randn(1000))
    assert torch.isfinite(result.loss).all()
    assert torch.isfinite(gradient).all()


def test_ddpm_loss_gradient_matches_finite_differences_at_fixed_mean():
    images, noise = images_and_noise(2, torch.float64)
    ddpm, timesteps = DDPM(), torch.tensor([0, 500])
    mean_part = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64)
    raw = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64, requires_grad=True)

    def loss(r: Tensor) -> Tensor:
        prediction = torch.cat([mean_part, r], dim=1)
        return ddpm.loss_at(lambda x, t: Output(prediction), images, noise, timesteps).loss

    assert torch.autograd.gradcheck(loss, raw)


def test_ddpm_without_learned_sigma_is_plain_mse():
    images, noise = images_and_noise()
    ddpm = DDPM(learned_sigma=False)
    result = ddpm.loss_at(
        lambda x, t: Output(torch.zeros_like(x)), images, noise, torch.tensor([0, 5, 999])
    )
    torch.testing.assert_close(result.loss, noise.square().mean(dim=(1, 2, 3)))
    assert ddpm.prediction_channels(CHANNELS) == CHANNELS
    assert DDPM().prediction_channels(CHANNELS) == 2 * CHANNELS
    with pytest.raises(ValueError, match=r"learned_sigma=True needs a prediction of 8 .* got 4"):
        DDPM().loss(lambda x, t: Output(x), images)
    with pytest.raises(ValueError, match=r"learned_sigma=False needs a prediction of 4 .* got 8"):
        ddpm.loss(lambda x, t: Output(torch.cat([x, x], 1)), images)


@given(st.integers(2, 1200), st.data())
@settings(max_examples=60, deadline=None)
def test_respaced_timesteps_are_distinct_and_reach_both_ends(num_timesteps, data):
    num_steps = data.draw(st.integers(2, num_timesteps))
    timesteps = DDPM(num_timesteps).sampling_timesteps(num_steps)
    assert len(timesteps) == num_steps
    assert timesteps[0] == num_timesteps - 1
    assert timesteps[-1] == 0
    assert all(a > b for a, b in pairwise(timesteps))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RectifiedFlow(std=0.0), "got 0.0"),
        (lambda: RectifiedFlow(timestep_distribution="cosine"), "'cosine'"),
        (lambda: DDPM(num_timesteps=1), "got 1"),
        (lambda: DDPM(beta_start=0.5, beta_end=0.1), "beta_start=0.5, beta_end=0.1"),
        (lambda: DDPM(vb_weight=-1.0), "got -1.0"),
    ],
)
def test_objectives_refuse_wrong_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("objective", [RectifiedFlow(), DDPM(learned_sigma=False)])
def test_losses_refuse_wrong_tensors(objective):
    images, noise = images_and_noise()
    t = objective.sample_timesteps(3, None, images.device)

    def denoise(x: Tensor, t: Tensor) -> Output:
        return Output(x)

    with pytest.raises(ValueError, match=r"\(B, C, H, W\), got shape \(4, 4, 4\)"):
        objective.loss(denoise, images[0])
    with pytest.raises(ValueError, match=r"float32 or float64, got torch.bfloat16"):
        objective.loss(denoise, images.bfloat16())
    with pytest.raises(ValueError, match=r"\(3, 4, 4, 4\).*\(2, 4, 4, 4\)"):
        objective.loss_at(denoise, images, noise[:2], t)
    with pytest.raises(ValueError, match=r"must be \(3,\).*got \(2,\)"):
        objective.loss_at(denoise, images, noise, t[:2])
    with pytest.raises(ValueError, match=r"got \(3,\) torch.int32"):
        objective.loss_at(denoise, images, noise, t.int())
