"""The learned noise schedule: exact ends, monotone, stable in float32; its gradient; the optimum it converges to."""

import json
import math

import mpmath
import pytest
import torch
from exact_models import GaussianMixture

from vdm_diffusers import LearnedNoiseSchedule, VDMScheduler
from vdm_diffusers.decoders import encode_pixels, softmax_log_likelihood
from vdm_diffusers.elbo import continuous_weight, prior_kl, squared_error
from vdm_diffusers.gaussian import diffuse
from vdm_diffusers.noise_schedules import NoiseSchedule
from vdm_diffusers.objectives import diffusion_loss
from vdm_diffusers.time_sampling import low_discrepancy, uniform

GRID = torch.linspace(0, 1, 1001, dtype=torch.float64)


def scrambled(seed: int = 0, scale: float = 1.0, **config) -> LearnedNoiseSchedule:
    """A schedule far from linear: every parameter moved at random."""
    schedule = LearnedNoiseSchedule(**{"log_snr_max": 9.0, "log_snr_min": -4.0, "hidden_features": 7} | config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in schedule.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return schedule


def midpoints(n: int) -> torch.Tensor:
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


# --- the function ----------------------------------------------------------------------------------------------------


def test_contract():
    schedule = LearnedNoiseSchedule(log_snr_max=13.3, log_snr_min=-5.0)
    assert isinstance(schedule, NoiseSchedule)
    for shape in [(), (1,), (11,), (3, 5, 2)]:
        t = torch.rand(shape, generator=torch.Generator().manual_seed(1))
        assert schedule(t).shape == schedule.derivative(t).shape == schedule.inverse(schedule(t)).shape == shape
    assert schedule(torch.rand(3)).dtype == torch.float32
    assert schedule(torch.rand(3).double()).dtype == schedule.log_snr(0.5).dtype == torch.float64
    linear = 13.3 - 18.3 * GRID
    torch.testing.assert_close(schedule.log_snr(GRID).detach(), linear, rtol=0, atol=0.01)  # a new one is nearly so


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_end_points_are_exact_whatever_the_weights(dtype):
    schedule = scrambled(scale=3.0, log_snr_max=13.3, log_snr_min=-5.0).to(dtype)
    assert schedule.log_snr(torch.tensor([0.0, 1.0])).tolist() == [13.3, -5.0]
    assert (schedule.log_snr_max, schedule.log_snr_min) == (13.3, -5.0)


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_decreasing_with_the_derivative_of_autograd_and_an_inverse(scale):
    schedule = scrambled(seed=2, scale=scale)
    t = GRID.clone().requires_grad_()
    log_snr = schedule.log_snr(t)
    assert bool((log_snr.diff() < 0).all())
    (derivative,) = torch.autograd.grad(log_snr.sum(), t)
    torch.testing.assert_close(schedule.derivative(GRID), derivative, rtol=1e-11, atol=0)
    torch.testing.assert_close(schedule.log_snr(schedule.inverse(log_snr)), log_snr, rtol=0, atol=1e-11)
    assert schedule.inverse(torch.tensor([99.0, 9.0, -4.0, -99.0])).tolist() == [0, 0, 1, 1]


def test_its_parts_are_right_to_a_few_units_in_the_last_place_in_float32():
    # steep, narrow bumps, times close to the ends: where f(t) - f(0) as it stands would lose every digit
    schedule = scrambled(seed=3, scale=2.0)
    with torch.no_grad():
        schedule.log_steepness += 3
        times = torch.tensor([1e-7, 1e-4, 0.03, 0.5, 0.97, 1 - 2.0**-12, 1 - 2.0**-24])
        parts = schedule._parts(times)
    assert parts[0].dtype == torch.float32
    with mpmath.workdps(50):
        a, b, c, m = (
            [mpmath.mpf(v) for v in p.double().reshape(-1).tolist()]
            for p in (schedule.log_slope, schedule.log_weight, schedule.log_steepness, schedule.center)
        )

        def f(t):
            total = mpmath.exp(a[0]) * t
            for log_b, log_c, center in zip(b, c, m, strict=True):
                total += mpmath.exp(log_b) / (1 + mpmath.exp(-mpmath.exp(log_c) * (t - center)))
            return total

        for i, t in enumerate(times.double().tolist()):
            reference = (f(mpmath.mpf(t)) - f(0), f(1) - f(mpmath.mpf(t)), mpmath.diff(f, mpmath.mpf(t)))
            for part, expected in zip(parts, reference, strict=True):
                # the steepness, up to e^7, multiplies the rounding of t - m inside the exponential
                assert abs(float(part[i]) / float(expected) - 1) < 2e-4
    # the same in float64
    parts64 = schedule._parts(times.double())
    for part, part64 in zip(parts, parts64, strict=True):
        torch.testing.assert_close(part.double(), part64, rtol=2e-4, atol=0)


def test_invalid_arguments_are_named():
    with pytest.raises(ValueError, match="log_snr = -gamma"):
        LearnedNoiseSchedule(log_snr_max=-5, log_snr_min=13.3)
    with pytest.raises(ValueError, match="must be finite"):
        LearnedNoiseSchedule(log_snr_max=math.inf)
    with pytest.raises(ValueError, match="hidden_features"):
        LearnedNoiseSchedule(hidden_features=0)
    with pytest.raises(ValueError, match=r"`t` must lie in \[0, 1\]"):
        LearnedNoiseSchedule()(torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="num_entries"):
        LearnedNoiseSchedule().table(1)


def test_saved_and_loaded_and_written_into_a_scheduler(tmp_path):
    schedule = scrambled(seed=4, learn_end_points=True)
    schedule.save_pretrained(tmp_path)
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".json", ".safetensors"]
    loaded = LearnedNoiseSchedule.from_pretrained(tmp_path)
    assert torch.equal(loaded.log_snr(GRID), schedule.log_snr(GRID))

    scheduler = VDMScheduler(
        beta_schedule="log_snr_linear", log_snr_max=9.0, log_snr_min=-4.0, log_snr_table=schedule.table(101)
    )
    again = VDMScheduler.from_config(json.loads(scheduler.to_json_string()))
    torch.testing.assert_close(again.noise_schedule.log_snr(GRID[::10]), schedule.log_snr(GRID[::10]), rtol=0, atol=0)
    # the envelope, and with it the network's input, is where it was
    assert torch.equal(
        again.timestep_from_log_snr(torch.tensor([2.0])),
        VDMScheduler(beta_schedule="log_snr_linear", log_snr_max=9.0, log_snr_min=-4.0).timestep_from_log_snr(
            torch.tensor([2.0])
        ),
    )


# --- its gradient ----------------------------------------------------------------------------------------------------


def mixture() -> GaussianMixture:
    means = torch.tensor([[-0.7, 0.2, 0.4], [0.6, -0.3, -0.5]], dtype=torch.float64)
    return GaussianMixture(means, torch.tensor([0.05, 0.2]).double(), torch.tensor([0.4, 0.6]).double())


def losses_at(model: GaussianMixture, x, noise, log_snr, weight) -> torch.Tensor:
    eps_hat = model.predict(diffuse(x, noise, log_snr), log_snr, "epsilon")
    return diffusion_loss(eps_hat, x, noise, log_snr, prediction_type="epsilon", elbo_weight=weight)


def test_gradient_against_finite_differences():
    # The same t, x and eps at every parameter value: the mean squared loss (and for the end points the mean loss) is
    # then an ordinary function of the parameters. The denoiser has a second use of log SNR, its own: the chain rule
    # must see both.
    schedule = scrambled(seed=5, scale=0.5, learn_end_points=True).double()
    model, generator = mixture(), torch.Generator().manual_seed(6)
    x = model.sample(37, generator)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    t = uniform(37, generator=generator)

    def objectives() -> tuple[float, float]:
        with torch.no_grad():
            losses = losses_at(model, x, noise, schedule.log_snr(t), continuous_weight(schedule.derivative(t)))
        return float((losses**2).mean()), float(losses.mean())

    cut = schedule.cut(t)
    losses = losses_at(model, x, noise, cut.log_snr, cut.elbo_weight)
    (7.0 * losses.mean()).backward()  # any scale, such as that of a gradient scaler
    cut.backward(losses, scale=7.0 / 37)
    checked = 0
    for name, parameter in schedule.named_parameters():
        which = 1 if name == "end_points" else 0
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for i in range(len(flat)):
            kept, step = float(flat[i]), 1e-5
            flat[i] = kept + step
            above = objectives()[which]
            flat[i] = kept - step
            below = objectives()[which]
            flat[i] = kept
            assert float(gradient[i]) == pytest.approx((above - below) / (2 * step), rel=1e-6, abs=1e-9), name
            checked += 1
    assert checked == 1 + 3 * 7 + 2


def test_the_denoisers_gradient_is_untouched_and_a_bypassed_cut_is_noticed():
    schedule = scrambled(seed=7)
    scale = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(8)
    x, noise = torch.randn(2, 9, 4, generator=generator, dtype=torch.float64)
    cut = schedule.cut(uniform(9, generator=generator))

    def loss(log_snr, weight):
        z_t = diffuse(x, noise, log_snr)
        return diffusion_loss(scale * z_t, x, noise, log_snr, prediction_type="epsilon", elbo_weight=weight)

    losses = loss(cut.log_snr, cut.elbo_weight)
    losses.mean().backward()
    with_cut = scale.grad.clone()
    cut.backward(losses, scale=1 / 9)
    assert torch.equal(scale.grad, with_cut)
    (alone,) = torch.autograd.grad(loss(cut.log_snr.detach(), cut.elbo_weight.detach()).mean(), scale)
    torch.testing.assert_close(with_cut, alone, rtol=1e-13, atol=0)

    bypassed = schedule.cut(cut.t)
    losses = loss(bypassed.log_snr.detach(), bypassed.elbo_weight)
    losses.mean().backward()
    with pytest.raises(RuntimeError, match="`log_snr` of this cut"):
        bypassed.backward(losses, scale=1 / 9)


# --- what it is for --------------------------------------------------------------------------------------------------


def test_expected_loss_depends_on_the_end_points_alone():
    # exact denoiser of N(0, 0.3 I): E|eps - eps_hat|^2 = D sigmoid(log_snr + ln 0.3), by closed form, and quadrature
    # over t
    def expected(schedule):
        t = midpoints(100_000)
        error = torch.sigmoid(schedule.log_snr(t) + math.log(0.3))
        return float((continuous_weight(schedule.derivative(t)) * error).mean())

    softplus = torch.nn.functional.softplus
    ends = torch.tensor([9.0, -4.0], dtype=torch.float64) + math.log(0.3)
    exact = 0.5 * float(softplus(ends[0]) - softplus(ends[1]))
    with torch.no_grad():
        for seed in range(4):
            assert expected(scrambled(seed, scale=1.0)) == pytest.approx(exact, rel=1e-6)
        assert abs(expected(scrambled(0, log_snr_max=8.0)) / exact - 1) > 0.05


def gaussian_losses(cut, x, noise, prior_variance):
    """Losses in nats for each dimension with the exact denoiser of N(0, prior_variance I)."""
    z_t = diffuse(x, noise, cut.log_snr)
    alpha_square, sigma_square = torch.sigmoid(cut.log_snr), torch.sigmoid(-cut.log_snr)
    gain = sigma_square.sqrt() / (alpha_square * prior_variance + sigma_square)
    return cut.elbo_weight * squared_error(noise, gain[:, None] * z_t) / x.shape[1]


def test_converges_to_the_density_proportional_to_the_root_mean_square():
    # For N(0, v I) the error is sigmoid(l + ln v) times a chi-square: its root mean square has the shape of that
    # sigmoid, and the best t(l) is a difference of softplus over the same difference at the ends.
    prior_variance, num_dims = 0.01, 32
    schedule = LearnedNoiseSchedule(9.0, -5.0, hidden_features=24)
    optimizer = torch.optim.Adam(schedule.parameters(), lr=0.03, betas=(0.9, 0.99))
    generator, steps = torch.Generator().manual_seed(0), 400

    def primitive(log_snr):
        return torch.nn.functional.softplus(log_snr + math.log(prior_variance))

    ends = torch.tensor([9.0, -5.0], dtype=torch.float64)
    total = float(primitive(ends[0]) - primitive(ends[1]))

    def excess():
        """E[L^2] over the smallest possible one, less 1, by quadrature."""
        with torch.no_grad():
            t = midpoints(20_000)
            root = torch.sigmoid(schedule.log_snr(t) + math.log(prior_variance))
            return float((schedule.derivative(t) ** 2 * root**2).mean()) / total**2 - 1

    assert excess() > 1.4  # linear in log SNR
    for step in range(steps):
        x, noise = torch.randn(2, 128, num_dims, generator=generator, dtype=torch.float64)
        cut = schedule.cut(uniform(128, generator=generator))
        losses = gaussian_losses(cut, x * prior_variance**0.5, noise, prior_variance)
        losses.mean().backward()
        cut.backward(losses, scale=1 / 128)
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    assert excess() < 0.03
    log_snr = torch.linspace(-5, 9, 57, dtype=torch.float64)
    best = (primitive(ends[0]) - primitive(log_snr)) / total
    assert float((schedule.inverse(log_snr) - best).abs().max()) < 0.03


def test_learned_end_points_improve_the_bound():
    # Integers of 5 levels, the exact denoiser made worse by a constant error, so that a wide range of log SNR has its
    # price and the best end points lie inside the envelope.
    levels = torch.tensor([[0, 3], [4, 1], [2, 2]])
    model = GaussianMixture.points(encode_pixels(levels, 5, dtype=torch.float64))
    schedule = LearnedNoiseSchedule(12.0, -10.0, hidden_features=8, learn_end_points=True)
    optimizer = torch.optim.Adam(schedule.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)

    def error(x, noise, log_snr):
        return squared_error(noise, model.predict(diffuse(x, noise, log_snr), log_snr, "epsilon") + 0.4)

    def prior_and_reconstruction(k, x, noise):
        highest, lowest = schedule.log_snr(torch.tensor([0.0, 1.0]))
        return prior_kl(x, lowest) - softmax_log_likelihood(k, diffuse(x, noise, highest), highest, num_levels=5)

    @torch.no_grad()
    def bounds() -> torch.Tensor:
        """16 independent estimates of the bound by quadrature over the envelope's log SNRs, with the same noise each
        time.
        """
        own, log_snr = torch.Generator().manual_seed(2), 12 - 22 * midpoints(900)
        inside = (log_snr < schedule.log_snr_max) & (log_snr > schedule.log_snr_min)
        k = levels.repeat(300, 1)
        x = encode_pixels(k, 5, dtype=torch.float64)
        estimates = []
        for _ in range(16):
            noise, noise_0 = torch.randn(2, 900, 2, generator=own, dtype=torch.float64)
            diffusion = 0.5 * 22 * inside * error(x, noise, log_snr)
            estimates.append(float((diffusion + prior_and_reconstruction(k, x, noise_0)).mean()))
        return torch.tensor(estimates)

    before = bounds()
    start = (schedule.log_snr_max, schedule.log_snr_min)
    for _ in range(250):
        k = levels[torch.randint(3, (96,), generator=generator)]
        noise, noise_0 = torch.randn(2, 96, 2, generator=generator, dtype=torch.float64)
        cut = schedule.cut(low_discrepancy(96, generator=generator))
        x = encode_pixels(k, 5, dtype=torch.float64)
        losses = cut.elbo_weight * error(x, noise, cut.log_snr)
        (losses + prior_and_reconstruction(k, x, noise_0)).mean().backward()
        cut.backward(losses, scale=1 / 96)
        optimizer.step()
        optimizer.zero_grad()
    gain = before - bounds()
    assert float(gain.mean()) > 5 * float(gain.std()) / math.sqrt(16)
    assert 12 > start[0] > schedule.log_snr_max > schedule.log_snr_min > start[1] > -10
