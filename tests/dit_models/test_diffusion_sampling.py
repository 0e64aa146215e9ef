import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dit_models.diffusion import DDPM, RectifiedFlow, generate, guided, noise_from_seeds

CHANNELS = 4
DATA_MEAN, DATA_STD = 0.7, 0.5


class Output(NamedTuple):
    sample: Tensor
    plans: tuple[str, ...] = ("plan",)


class RecordingModel(nn.Module):
    """Couples all pixels of an image (never two images) and depends on timestep and label."""

    def __init__(self, out_channels: int = CHANNELS) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(CHANNELS, out_channels, 3, padding=1)
        for parameter in self.conv.parameters():
            nn.init.normal_(parameter, std=0.2, generator=generator)
        self.batch_sizes: list[int] = []
        self.timesteps: list[float] = []

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Output:
        self.batch_sizes.append(x.shape[0])
        self.timesteps.append(timesteps[0].item())
        shift = timesteps / (1 + timesteps)
        if labels is not None:
            shift = shift + labels / 10
        pooled = x.mean(dim=(1, 2, 3)) + shift
        return Output(torch.tanh(self.conv(x) + pooled.view(-1, 1, 1, 1)))


def gaussian_velocity(x: Tensor, timesteps: Tensor) -> Output:
    """E[noise - data | x_t] for data ~ N(DATA_MEAN, DATA_STD^2)."""
    t = timesteps.view(-1, 1, 1, 1)
    variance = (1 - t) ** 2 * DATA_STD**2 + t**2
    centred = x - (1 - t) * DATA_MEAN
    return Output((t - (1 - t) * DATA_STD**2) / variance * centred - DATA_MEAN)


def gaussian_noise_predictor(
    objective: DDPM, mean: float, std: float, raw: float | None
) -> Callable[..., Output]:
    """E[noise | x_t] for data ~ N(mean, std^2), beside a constant raw variance output."""

    def model(x: Tensor, timesteps: Tensor) -> Output:
        alpha_bar = objective.alphas_cumprod.to(x.device)[timesteps.long()].view(-1, 1, 1, 1)
        variance = alpha_bar * std**2 + 1 - alpha_bar
        noise = ((1 - alpha_bar).sqrt() / variance).float() * (x - alpha_bar.sqrt().float() * mean)
        if raw is None:
            return Output(noise)
        return Output(torch.cat([noise, torch.full_like(noise, raw)], dim=1))

    return model


# guidance


def labels(*values: int) -> dict[str, Tensor]:
    return {"labels": torch.tensor(values)}


@pytest.mark.parametrize(("out_channels", "channels"), [(4, None), (8, None), (4, 3), (8, 3)])
def test_guidance_is_u_plus_s_times_c_minus_u(out_channels, channels):
    model = RecordingModel(out_channels)
    x = noise_from_seeds([0, 1], (CHANNELS, 4, 4))
    cond, uncond = labels(1, 2), labels(9, 9)
    denoised = guided(model, cond, uncond, 3.5, channels=channels)(x, 0.4)
    assert model.batch_sizes == [4]
    t = torch.full((2,), 0.4)
    c, u = model(x, t, **cond).sample, model(x, t, **uncond).sample
    n = channels or CHANNELS
    torch.testing.assert_close(denoised.sample[:, :n], u[:, :n] + 3.5 * (c[:, :n] - u[:, :n]))
    torch.testing.assert_close(denoised.sample[:, n:], c[:, n:])
    torch.testing.assert_close(denoised.model_output.sample, torch.cat([c, u]))


def test_guidance_scale_one_runs_the_conditional_branch_alone():
    model = RecordingModel()
    x = noise_from_seeds([0, 1], (CHANNELS, 4, 4))
    denoised = guided(model, labels(1, 2), labels(9, 9), 1.0)(x, 0.4)
    assert model.batch_sizes == [2]
    assert torch.equal(denoised.sample, model(x, torch.full((2,), 0.4), **labels(1, 2)).sample)


def test_guidance_is_active_only_inside_its_interval():
    model = RecordingModel()
    noise = noise_from_seeds([0, 1], (CHANNELS, 4, 4))
    generate(
        model, noise, objective=RectifiedFlow(), sampler="euler", num_steps=4,
        cond=labels(1, 2), uncond=labels(9, 9), guidance_scale=2.0, guidance_interval=(0.5, 0.8),
    )  # fmt: skip
    assert model.timesteps == [1.0, 0.75, 0.5, 0.25]
    assert model.batch_sizes == [2, 4, 4, 2]

    model = RecordingModel(2 * CHANNELS)
    generate(
        model, noise, objective=DDPM(), sampler="ddim", num_steps=3,
        cond=labels(1, 2), uncond=labels(9, 9), guidance_scale=2.0, guidance_interval=(0.0, 0.6),
    )  # fmt: skip
    assert model.timesteps == [999, 500, 0]
    assert model.batch_sizes == [2, 4, 4]


def test_guided_denoiser_never_reads_a_value_from_the_device():
    # A meta tensor has no values: reading one raises, as reading one from a GPU would wait for it.
    x = torch.empty(2, CHANNELS, 4, 4, device="meta")
    cond = {"labels": torch.empty(2, dtype=torch.int64, device="meta")}
    denoise = guided(lambda x, t, labels: Output(x * t.view(-1, 1, 1, 1)), cond, cond, 2.0)
    assert denoise(x, 0.5).sample.device.type == "meta"
    for sampler in ("euler", "heun"):
        images = generate(
            lambda x, t: Output(x * t.view(-1, 1, 1, 1)),
            x, objective=RectifiedFlow(), sampler=sampler, num_steps=3,
        )  # fmt: skip
        assert images.device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 2.0, "uncond": None}, "scale 2.0 needs uncond"),
        ({"scale": 2.0, "uncond": labels(0)}, r"cond .*\(2,\).* and uncond .*\(1,\)"),
        ({"scale": 2.0, "uncond": {"text": torch.zeros(2)}}, "labels.*text"),
        ({"interval": (0.6, 0.5)}, r"\(0.6, 0.5\)"),
        ({"interval": (0.0, 1.5)}, r"\(0.0, 1.5\)"),
        ({"channels": 0}, "got 0"),
    ],
)
def test_guided_refuses_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        guided(RecordingModel(), labels(1, 2), **arguments)


def test_guided_refuses_a_batch_or_channel_count_that_does_not_fit():
    x = noise_from_seeds([0, 1], (CHANNELS, 4, 4))
    with pytest.raises(ValueError, match="3 rows for a batch of 2"):
        guided(RecordingModel(), labels(1, 2, 3))(x, 0.5)
    with pytest.raises(ValueError, match="channels=5 is more than the image's 4"):
        guided(RecordingModel(), labels(1, 2), labels(9, 9), 2.0, channels=5)(x, 0.5)


# samplers: flow


def flow_error(sampler: str, num_steps: int) -> float:
    """Largest error against the exact flow of Gaussian data, x_0 = mean + std·x_1."""
    noise = noise_from_seeds([0, 1], (CHANNELS, 8, 8))
    images = generate(
        gaussian_velocity, noise, objective=RectifiedFlow(), sampler=sampler, num_steps=num_steps
    )
    return (images - (DATA_MEAN + DATA_STD * noise)).abs().max().item()


def test_flow_samplers_converge_to_the_exact_flow_at_their_order():
    euler = [flow_error("euler", n) for n in (20, 40, 80)]
    heun = [flow_error("heun", n) for n in (20, 40, 80)]
    assert all(h < e / 4 for h, e in zip(heun, euler, strict=True))
    assert euler[0] / euler[1] == pytest.approx(2, rel=0.15)
    assert euler[1] / euler[2] == pytest.approx(2, rel=0.15)
    assert heun[0] / heun[1] == pytest.approx(4, rel=0.25)
    assert heun[1] / heun[2] == pytest.approx(4, rel=0.25)
    assert heun[2] < 2e-3


def test_euler_is_the_explicit_formula():
    model = RecordingModel()
    noise = noise_from_seeds([0, 1], (CHANNELS, 4, 4))
    images = generate(model, noise, objective=RectifiedFlow(), sampler="euler", num_steps=5)
    assert model.timesteps == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    x = noise
    with torch.no_grad():
        for step in range(5):
            x = x - 0.2 * model(x, torch.full((2,), 1 - step / 5)).sample
    torch.testing.assert_close(images, x, rtol=0, atol=1e-6)


def test_heun_agrees_with_diffusers_where_its_grid_is_uniform():
    module = pytest.importorskip("diffusers.schedulers.scheduling_flow_match_heun_discrete")
    num_steps = 6
    # With as many training as sampling timesteps its grid happens to be 1, 5/6, ..., 1/6, 0.
    scheduler = module.FlowMatchHeunDiscreteScheduler(num_train_timesteps=num_steps)
    scheduler.set_timesteps(num_steps)
    scheduler.set_begin_index(0)
    model = RecordingModel()
    x = noise = noise_from_seeds([0, 1], (CHANNELS, 4, 4))
    with torch.no_grad():
        for t in scheduler.timesteps:
            velocity = model(x, (t / num_steps).expand(2)).sample
            x = scheduler.step(velocity, t, x).prev_sample
    peer_timesteps, model.timesteps = model.timesteps, []
    ours = generate(model, noise, objective=RectifiedFlow(), sampler="heun", num_steps=num_steps)
    assert model.timesteps == pytest.approx(peer_timesteps)
    assert len(model.timesteps) == 2 * num_steps - 1
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


# samplers: diffusion


@pytest.mark.parametrize("num_steps", [10, 100])
@pytest.mark.parametrize(("std", "raw"), [(1.0, 1.0), (0.0, -1.0)])
def test_respaced_ddpm_keeps_the_exact_marginals(num_steps, std, raw):
    # The true reverse variance is beta for data of unit variance and beta_tilde for a point: of the
    # respaced chain. The betas of the full chain would be far too small for 10 steps of 1000.
    objective = DDPM()
    model = gaussian_noise_predictor(objective, DATA_MEAN, std, raw)
    seeds = list(range(8))
    deviations = []

    def compare(step: int, t: float, x: Tensor, output: Output) -> None:
        alpha_bar = objective.alphas_cumprod[int(t)].item()
        marginal_std = math.sqrt(alpha_bar * std**2 + 1 - alpha_bar)
        standard_error = marginal_std / math.sqrt(x.numel())
        deviations.append((x.mean().item() - math.sqrt(alpha_bar) * DATA_MEAN) / standard_error)
        deviations.append((x.std().item() - marginal_std) / standard_error * math.sqrt(2))

    noise = noise_from_seeds(seeds, (CHANNELS, 32, 32))
    options = {"objective": objective, "num_steps": num_steps, "seeds": seeds}
    images = generate(model, noise, sampler="ddpm", callback=compare, **options)
    assert len(deviations) == 2 * num_steps
    assert max(map(abs, deviations)) < 4.5  # standard errors
    assert images.mean().item() == pytest.approx(DATA_MEAN, abs=4.5 * std / 181 + 1e-4)
    assert images.std().item() == pytest.approx(std, abs=4.5 * std / 256 + 2e-4)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_fixed_variance_samplers_converge_to_the_data(sampler):
    objective = DDPM(learned_sigma=False)
    model = gaussian_noise_predictor(objective, DATA_MEAN, DATA_STD, None)
    seeds = list(range(8))
    noise = noise_from_seeds(seeds, (CHANNELS, 32, 32))
    images = generate(
        model, noise, objective=objective, sampler=sampler, num_steps=1000, seeds=seeds
    )
    assert images.mean().item() == pytest.approx(DATA_MEAN, abs=0.02)
    assert images.std().item() == pytest.approx(DATA_STD, abs=0.01)
    if sampler == "ddim":  # deterministic: the exact probability flow maps each pixel alone
        torch.testing.assert_close(images, DATA_MEAN + DATA_STD * noise, rtol=0, atol=0.02)


@pytest.mark.parametrize("raw", [0.3, None])
def test_ddpm_step_is_the_posterior_of_the_training_objective(raw):
    # The scheduler that samples and the objective that trains must mean the same p(x_{t-1} | x_t);
    # a float32 schedule in one of them already shows (4e-4 of the last steps' noise).
    objective = DDPM(learned_sigma=raw is not None)
    model = gaussian_noise_predictor(objective, DATA_MEAN, DATA_STD, raw)
    shape, seeds = (CHANNELS, 4, 4), [4, 7]
    trace = []
    images = generate(
        model, noise_from_seeds(seeds, shape), objective=objective, sampler="ddpm",
        num_steps=1000, seeds=seeds,
        callback=lambda step, t, x, output: trace.append((int(t), x, output.sample)),
    )  # fmt: skip
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw() -> Tensor:
        return torch.stack([torch.randn(shape, generator=g) for g in generators])

    assert torch.equal(draw(), trace[0][1])  # an image's stream opens with its initial noise
    after = [x for _, x, _ in trace[1:]] + [images]
    for (t, x, prediction), x_next in zip(trace, after, strict=True):
        timesteps = torch.full((2,), t)
        data = objective.predict_data(x, prediction[:, :CHANNELS], timesteps)
        expected, log_variance = objective.posterior(data, x, timesteps)
        if raw is not None:
            log_variance = objective.log_variance(prediction[:, CHANNELS:], timesteps)
        if t > 0:
            expected = expected + (log_variance / 2).exp() * draw()
        torch.testing.assert_close(x_next, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_agrees_with_diffusers_on_the_full_grid(eta):
    module = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    objective = DDPM(num_timesteps=25)
    scheduler = module.DDIMScheduler(num_train_timesteps=25, clip_sample=True)
    scheduler.set_timesteps(25)
    model = RecordingModel(2 * CHANNELS)
    seeds = [4, 7]
    x = noise = noise_from_seeds(seeds, (CHANNELS, 4, 4))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    draw = lambda: torch.stack([torch.randn(CHANNELS, 4, 4, generator=g) for g in generators])  # noqa: E731
    draw()
    with torch.no_grad():
        for t in scheduler.timesteps.tolist():
            prediction = model(x, torch.full((2,), float(t))).sample[:, :CHANNELS]
            x = scheduler.step(
                prediction, t, x, eta=eta, use_clipped_model_output=True, variance_noise=draw()
            ).prev_sample
    ours = generate(
        model, noise, objective=objective, sampler="ddim", num_steps=25, eta=eta, seeds=seeds,
        clip_range=1.0,
    )  # fmt: skip
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_ddim_is_deterministic_and_ddpm_follows_its_seeds():
    model = RecordingModel(2 * CHANNELS)
    noise = noise_from_seeds([0, 1], (CHANNELS, 4, 4))

    def sample(sampler: str, seeds: list[int], eta: float = 0.0) -> Tensor:
        return generate(
            model, noise, objective=DDPM(), sampler=sampler, num_steps=6, seeds=seeds, eta=eta
        )

    assert torch.equal(sample("ddim", [0, 1]), sample("ddim", [5, 6]))
    for sampler, eta in [("ddpm", 0.0), ("ddim", 1.0)]:
        first = sample(sampler, [0, 1], eta)
        assert torch.equal(first, sample(sampler, [0, 1], eta))
        other = sample(sampler, [0, 6], eta)
        assert torch.equal(first[0], other[0])
        assert not torch.equal(first[1], other[1])


# samplers: all

ALL_SAMPLERS = [
    (RectifiedFlow(), "euler", 0.0),
    (RectifiedFlow(), "heun", 0.0),
    (DDPM(), "ddpm", 0.0),
    (DDPM(), "ddim", 0.0),
    (DDPM(), "ddim", 1.0),
]


@pytest.mark.parametrize(("objective", "sampler", "eta"), ALL_SAMPLERS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_an_image_is_the_same_alone_and_in_a_batch(objective, sampler, eta, scale):
    model = RecordingModel(2 * CHANNELS)

    def sample(seeds: list[int]) -> Tensor:
        return generate(
            model, noise_from_seeds(seeds, (CHANNELS, 8, 8)), objective=objective,
            sampler=sampler, num_steps=8, cond=labels(*[s % 3 for s in seeds]),
            uncond=labels(*[9] * len(seeds)), guidance_scale=scale, seeds=seeds, eta=eta,
        )  # fmt: skip

    seeds = [11, 12, 13, 14, 15, 16, 17, 18]
    together = sample(seeds)
    # DDPM starts by dividing by sqrt(alpha_bar) = 0.006, so "to rounding" is relative to its scale.
    tolerance = 1e-5 * max(1.0, together.abs().max().item())
    for row in (0, 5):
        alone = sample([seeds[row]])
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=tolerance)


@pytest.mark.parametrize(("objective", "sampler", "eta"), ALL_SAMPLERS)
def test_callback_sees_every_step_and_the_models_own_output(objective, sampler, eta):
    model = RecordingModel(2 * CHANNELS)
    noise = noise_from_seeds([0, 1], (CHANNELS, 4, 4))
    seen = []
    generate(
        model, noise, objective=objective, sampler=sampler, num_steps=5, eta=eta, seeds=[0, 1],
        callback=lambda *arguments: seen.append(arguments),
    )  # fmt: skip
    steps, timesteps, states, outputs = zip(*seen, strict=True)
    assert steps == (0, 1, 2, 3, 4)
    assert list(timesteps) == objective.sampling_timesteps(5)
    assert torch.equal(states[0], noise)
    assert all(output.plans == ("plan",) for output in outputs)
    with torch.no_grad():
        again = model(states[3], torch.full((2,), float(timesteps[3])))
    torch.testing.assert_close(outputs[3].sample, again.sample)


@pytest.mark.parametrize(("objective", "sampler", "eta"), ALL_SAMPLERS)
def test_clip_range_bounds_the_predicted_data(objective, sampler, eta):
    model = RecordingModel(2 * CHANNELS)
    noise = noise_from_seeds([0, 1], (CHANNELS, 4, 4))

    def largest(clip_range: float | None) -> float:
        images = generate(
            model, noise, objective=objective, sampler=sampler, num_steps=5, eta=eta,
            seeds=[0, 1], clip_range=clip_range,
        )  # fmt: skip
        return images.abs().max().item()

    # The last step of every sampler lands on the predicted data.
    assert largest(None) > 0.3
    assert largest(0.25) == pytest.approx(0.25, abs=1e-6)


def test_update_is_float32_whatever_the_model_returns():
    noise = noise_from_seeds([0], (CHANNELS, 4, 4))
    images = generate(
        lambda x, t: Output((x * 0 + 1.0).bfloat16()), noise,
        objective=RectifiedFlow(), sampler="euler", num_steps=10,
    )  # fmt: skip
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, noise - 1, rtol=0, atol=1e-6)


def test_generate_keeps_the_noise_and_shows_progress(capsys):
    noise = noise_from_seeds([0], (CHANNELS, 4, 4))
    before = noise.clone()
    generate(
        RecordingModel(), noise, objective=RectifiedFlow(), sampler="heun", num_steps=3,
        progress=True,
    )  # fmt: skip
    assert torch.equal(noise, before)
    assert "heun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "ddim"}, "'ddim' does not sample a RectifiedFlow"),
        ({"objective": DDPM(), "sampler": "heun"}, "'heun' does not sample a DDPM"),
        ({"sampler": "dpm++"}, "'dpm\\+\\+'"),
        ({"num_steps": 0}, "num_steps >= 1, got 0"),
        ({"objective": DDPM(50), "sampler": "ddim", "num_steps": 51}, "num_timesteps=50, got 51"),
        ({"objective": DDPM(), "sampler": "ddpm", "num_steps": 1}, "num_steps >= 2, got 1"),
        ({"objective": DDPM(), "sampler": "ddpm", "seeds": None}, "give seeds"),
        ({"objective": DDPM(), "sampler": "ddim", "eta": 0.5, "seeds": None}, "give seeds"),
        ({"objective": DDPM(), "sampler": "ddim", "eta": 1.5}, r"\[0, 1\], got 1.5"),
        ({"eta": 0.5}, "eta=0.5 is an option of ddim"),
        ({"seeds": [1, 2, 3]}, "3 seeds for 2 images"),
        ({"clip_range": 0.0}, "clip_range must be > 0 or None, got 0.0"),
        ({"noise": torch.zeros(2, 4, 4)}, r"\(2, 4, 4\)"),
        ({"noise": torch.zeros(2, 4, 4, 4).double()}, "float64"),
        ({"guidance_scale": 2.0}, "needs uncond"),
    ],
)
def test_generate_refuses_wrong_arguments(changes, message):
    arguments = {
        "noise": noise_from_seeds([0, 1], (CHANNELS, 4, 4)), "objective": RectifiedFlow(),
        "sampler": "euler", "num_steps": 4, "seeds": [0, 1],
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        generate(RecordingModel(2 * CHANNELS), **(arguments | changes))
