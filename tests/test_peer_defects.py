"""Where the schedulers that VDMScheduler stands in for are measurably wrong (Diffusers 0.42.1), and that it is right
there.

Every test shows both sides against the same reference. Should a release of Diffusers repair a defect, `defect` skips
that test.
"""

import itertools
import math

import mpmath as mp
import numpy as np
import pytest
import scheduler_reference as reference
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.training_utils import compute_snr

from vdm_diffusers import VDMScheduler

IMAGE = (2, 3, 4, 5)


def defect(present: bool, what: str) -> None:
    """Goes on where the peer still has the defect."""
    if not present:
        pytest.skip(f"this release of Diffusers no longer {what}")


def noise(seed: int, shape=IMAGE, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def steps(scheduler, output, timestep, sample, seed=0, **kwargs):
    return scheduler.step(output, timestep, sample, generator=torch.manual_seed(seed), **kwargs).prev_sample


def relative(value, exact) -> torch.Tensor:
    return (torch.as_tensor(value, dtype=torch.float64) - exact).abs() / exact.abs()


def posterior_variances(alpha_bars):
    """For t = 1, ..., T - 1 (at t = 0 it is 0)."""
    return reference.to_tensor([reference.posterior(t, s)[2] for s, t in itertools.pairwise(alpha_bars)])


@pytest.mark.parametrize(("num_steps", "worst"), [(1000, 0.8), (250, 0.15)])
def test_row_1_vdm_schedule_given_as_betas(num_steps, worst):
    log_snrs = [13.3 - mp.mpf(i + 1) / num_steps * mp.mpf(13.3 + 5.0) for i in range(num_steps)]
    alpha_bars = [1 / (1 + mp.exp(-x)) for x in log_snrs]
    betas = [float(1 - a / b) for a, b in zip(alpha_bars, [mp.mpf(1), *alpha_bars], strict=False)]
    exact = posterior_variances(alpha_bars)
    t = range(1, num_steps)

    peer = DDPMScheduler(num_train_timesteps=num_steps, trained_betas=betas)
    errors = relative([float(peer._get_variance(i)) for i in t], exact)
    defect(float(errors.max()) > 1e-3, "rounds betas to float32")
    assert errors.max() > worst
    if num_steps == 1000:
        assert int((errors > 0.01).sum()) > 150

    for ours in (
        VDMScheduler(num_train_timesteps=num_steps, beta_schedule="log_snr_linear"),
        VDMScheduler(num_train_timesteps=num_steps, trained_betas=betas),
    ):
        assert (
            relative([float(ours._get_variance(i)) for i in t], exact).max() < 1e-9
            if ours.config.trained_betas
            else 1e-12
        )
        log_snr = ours.log_snr(torch.arange(num_steps))
        assert (log_snr - reference.to_tensor(log_snrs)).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("name", "num_steps", "worst"),
    [("linear", 1000, 3e-4), ("squaredcos_cap_v2", 1000, 8e-4), ("squaredcos_cap_v2", 4000, 4e-3)],
)
def test_row_2_ordinary_schedules_in_float32(name, num_steps, worst):
    alpha_bars = reference.alpha_bars(reference.betas(name, num_steps))
    exact, t = posterior_variances(alpha_bars), range(1, num_steps)
    one_minus = float(1 - alpha_bars[0])

    peer = DDPMScheduler(num_train_timesteps=num_steps, beta_schedule=name)
    errors = relative([float(peer._get_variance(i)) for i in t], exact)
    defect(float(errors.max()) > 1e-6, "keeps alpha_bar in float32")
    assert errors.max() > worst
    assert abs(float(1 - peer.alphas_cumprod[0]) / one_minus - 1) > 1e-4

    ours = VDMScheduler(num_train_timesteps=num_steps, beta_schedule=name)
    assert relative([float(ours._get_variance(i)) for i in t], exact).max() < 1e-12
    assert abs(float((-ours.log_snr(0)).sigmoid()) / one_minus - 1) < 1e-12


@pytest.mark.parametrize(
    ("name", "dtype", "silent"),
    [
        ("linear", torch.bfloat16, 8),
        ("squaredcos_cap_v2", torch.bfloat16, 18),
        ("squaredcos_cap_v2", torch.float16, 3),
        ("log_snr_linear", torch.float16, 250),
        ("log_snr_linear", torch.bfloat16, 350),
    ],
)
def test_row_3_no_noise_in_half_precision(name, dtype, silent):
    ours = VDMScheduler(beta_schedule=name)
    peer = DDPMScheduler.from_config(ours.as_discrete().config)
    t = torch.arange(1000)
    zero, one = torch.zeros(1000, 1, dtype=dtype), torch.ones(1000, 1, dtype=dtype)
    exact = (-ours.log_snr(t)).sigmoid().sqrt()[:, None]

    defect(int((peer.add_noise(zero, one, t) == 0).sum()) > 0, "casts alpha_bar to the sample's dtype")
    assert int((peer.add_noise(zero, one, t) == 0).sum()) >= silent
    assert int((peer.get_velocity(one, zero, t) == 0).sum()) >= silent

    for sigma in (ours.add_noise(zero, one, t), -ours.get_velocity(one, zero, t)):
        assert sigma.dtype == dtype
        assert bool(((sigma.double() - exact).abs() <= reference.ulp(exact, dtype)).all())


def test_row_4_trailing_has_exactly_n_steps():
    peer, ours = DDPMScheduler(timestep_spacing="trailing"), VDMScheduler(timestep_spacing="trailing")
    wrong, agree = [], 0
    for n in range(1, 1001):
        peer.set_timesteps(n), ours.set_timesteps(n)
        t = ours.timesteps
        assert (len(t), int(t[0])) == (n, 999) and int(t[-1]) >= 0 and bool((t.diff() < 0).all())
        if len(peer.timesteps) != n:
            assert int(peer.timesteps[-1]) == -1 or len(peer.timesteps) == n + 1
            wrong.append(n)
        else:
            agree += torch.equal(peer.timesteps, t)
    defect(bool(wrong), "counts n + 1 steps")
    assert len(wrong) >= 60 and {61, 103, 121, 122, 201} <= set(wrong)
    assert agree == 1000 - len(wrong)  # everywhere else the grid is the peer's


@pytest.mark.parametrize(
    ("variance_type", "like"), [("fixed_large_log", "fixed_large"), ("fixed_small_log", "fixed_small")]
)
def test_row_5_fixed_large_log(variance_type, like):
    x, output = noise(0), noise(1)
    if variance_type == "fixed_large_log":
        peer = steps(DDPMScheduler(variance_type=variance_type), output, 500, x)
        defect(bool(peer.isnan().any()), "takes the root of a logarithm")
        assert bool(peer.isnan().all())
    right = steps(DDPMScheduler(variance_type=like), output, 500, x)
    ours = steps(VDMScheduler(variance_type=variance_type), output, 500, x)
    assert (ours - right).abs().max() < 1e-5


def test_row_6_learned_variance_is_a_log_variance():
    x, output = noise(0), noise(1)
    log_variance = torch.full_like(x, -4.0)
    both = torch.cat([output, log_variance], dim=1)
    peer = steps(DDPMScheduler(variance_type="learned"), both, 500, x)
    defect(bool(peer.isnan().any()), "takes the root of a log-variance")
    assert bool(peer.isnan().all())

    ours = VDMScheduler(variance_type="learned")
    added = steps(ours, both, 500, x, seed=3).double() - steps(ours, both, 500, x, seed=4)
    expected = math.exp(-2) * (noise(3).double() - noise(4))
    assert (added - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("config", "grid", "deviation"),
    [
        ({"variance_type": "fixed_large", "timestep_spacing": "trailing"}, {"num_inference_steps": 10}, 0.3),
        ({"variance_type": "fixed_large"}, {"timesteps": [999, 750, 500, 250]}, 0.6),
        ({"variance_type": "learned_range", "timestep_spacing": "trailing"}, {"num_inference_steps": 10}, 0.1),
    ],
)
def test_row_7_no_noise_in_the_last_step(config, grid, deviation):
    x = noise(0, (1, 3, 64, 64))
    channels = 6 if config["variance_type"] == "learned_range" else 3
    output = 0.9 * torch.ones(1, channels, 64, 64)

    def last_steps(scheduler):
        scheduler.set_timesteps(**grid)
        return [steps(scheduler, output, scheduler.timesteps[-1], x, seed) for seed in (0, 1)]

    first, second = last_steps(DDPMScheduler(**config))
    defect(not torch.equal(first, second), "adds noise in the last step")
    assert (first - second).std() / math.sqrt(2) > deviation
    first, second = last_steps(VDMScheduler(**config))
    assert torch.equal(first, second)
    alpha, sigma = (
        f(VDMScheduler().log_snr(int(grid.get("timesteps", [99])[-1]))).sqrt()
        for f in (torch.sigmoid, lambda v: torch.sigmoid(-v))
    )
    x_hat = ((x.double() - sigma * output[:, :3].double()) / alpha).clamp(-1, 1)
    assert (first - x_hat).abs().max() < 1e-6  # the prediction itself


def test_row_8_epsilon_at_zero_terminal_snr():
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    x, output = noise(0), noise(1)
    for peer_class in (DDPMScheduler, DDIMScheduler):
        peer = peer_class(**config)
        peer.set_timesteps(10)
        after = peer.step(output, peer.timesteps[0], x).prev_sample
        defect(not bool(after.isfinite().any()), "divides by zero there")
    assert not bool(torch.isfinite(torch.ones(1) / compute_snr(DDPMScheduler(**config), torch.tensor([999]))).all())

    ours = VDMScheduler(**config)
    ours.set_timesteps(10)
    with pytest.raises(ValueError, match="zero terminal SNR.*predicts v"):
        ours.step(output, ours.timesteps[0], x)
    ours.step(output, ours.timesteps[1], x)  # only that step is undefined
    with pytest.raises(ValueError, match="zero terminal SNR"):
        ours.step(output, ours.timesteps[:2], x)

    # v-prediction says x_hat = -v there, and the step to s is alpha_s x_hat + sigma_s noise exactly
    ours = VDMScheduler(prediction_type="v_prediction", **config)
    ours.set_timesteps(10)
    assert float(ours.log_snr(999)) == -math.inf
    alpha_bars = reference.zero_terminal(reference.alpha_bars(reference.betas("linear", 1000)))
    after = steps(ours, output, ours.timesteps[0], x)
    alpha_bar = float(alpha_bars[899])
    expected = math.sqrt(alpha_bar) * -output + math.sqrt(1 - alpha_bar) * noise(0)
    assert (after - expected).abs().max() < 1e-6


@pytest.mark.parametrize("n", [600, 501, 999])
def test_row_9_leading_starts_at_the_noisy_end(n):
    peer, ours = DDPMScheduler(), VDMScheduler()
    peer.set_timesteps(n), ours.set_timesteps(n)
    defect(int(peer.timesteps[0]) == n - 1, "starts in mid-schedule")
    if n < 999:
        assert float(peer.alphas_cumprod[n - 1]) > 0.02  # pure noise is put where there is signal
    assert (int(ours.timesteps[0]), int(ours.timesteps[-1]), len(ours.timesteps.unique())) == (999, 0, n)


def test_row_9_leading_is_the_peers_grid_elsewhere():
    for offset in (0, 1):
        peer, ours = DDPMScheduler(steps_offset=offset), VDMScheduler(steps_offset=offset)
        for n in [*range(1, 501), 1000]:
            if n == 1000 and offset:
                continue
            peer.set_timesteps(n), ours.set_timesteps(n)
            assert torch.equal(peer.timesteps, ours.timesteps), (offset, n)


def test_row_10_steps_offset_with_every_step():
    x, output = noise(0), noise(1)
    peer, ours = DDPMScheduler(steps_offset=1), VDMScheduler(steps_offset=1)
    peer.set_timesteps(1000), ours.set_timesteps(1000)
    defect(int(peer.timesteps[0]) == 1000, "leaves the schedule")
    with pytest.raises(IndexError):
        peer.step(output, peer.timesteps[0], x)
    assert ours.timesteps.tolist() == list(range(999, -1, -1))
    assert bool(steps(ours, output, ours.timesteps[0], x).isfinite().all())


def test_row_11_lower_end_of_learned_range():
    lowest = torch.tensor([-1.0], dtype=torch.float64)
    peer = float(
        DDPMScheduler(variance_type="learned_range")._get_variance(torch.tensor(0), predicted_variance=lowest)
    )
    defect(peer < -40, "clamps the variance at 1e-20")
    assert peer == pytest.approx(math.log(1e-20), abs=1e-3)

    alpha_bars = reference.alpha_bars(reference.betas("linear", 1000))
    expected = float(mp.log(reference.posterior(alpha_bars[1], alpha_bars[0])[2]))  # improved DDPM: x_2's, clipped
    assert expected == pytest.approx(-9.82, abs=0.01)
    ours = VDMScheduler(variance_type="learned_range")._get_variance(0, predicted_variance=lowest)
    assert float(ours.log()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("dtype", "at_stake"), [(torch.float32, 9e-6), (torch.float16, 0.046), (torch.bfloat16, 0.37)]
)
def test_row_12_data_from_exact_noise_at_the_noisy_end(dtype, at_stake):
    """Most of the error is the rounding of the inputs, times 1/alpha = 157; what the scheduler adds to it, ours does
    not.
    """
    alpha_bar = reference.alpha_bars(reference.betas("linear", 1000))[-1]
    alpha, sigma = float(mp.sqrt(alpha_bar)), float(mp.sqrt(1 - alpha_bar))
    x = noise(0, (1, 3, 32, 32), torch.float64).clamp(-1, 1)
    eps = noise(1, x.shape, torch.float64)
    z, eps, v = (y.to(dtype) for y in (alpha * x + sigma * eps, eps, alpha * eps - sigma * x))
    same_inputs = (z.double() - sigma * eps.double()) / alpha  # exact, of the rounded inputs

    def rms(value, exact):
        return float((value.double() - exact).square().mean().sqrt())

    def predicted(scheduler_class, output, prediction_type="epsilon"):
        scheduler = scheduler_class(clip_sample=False, prediction_type=prediction_type)
        return scheduler.step(output, 999, z).pred_original_sample

    peer, ours = predicted(DDPMScheduler, eps), predicted(VDMScheduler, eps)
    assert rms(peer, x) == pytest.approx(at_stake, rel=0.2)
    defect(rms(peer, same_inputs) > 1.3 * rms(ours, same_inputs), "adds to it")
    final_rounding = float(torch.finfo(dtype).eps * same_inputs.abs().max())
    assert rms(ours, same_inputs) < (6e-8 / alpha if dtype == torch.float32 else final_rounding)
    assert rms(predicted(VDMScheduler, v, "v_prediction"), x) < torch.finfo(dtype).eps  # v is the cure


def test_row_13_timesteps_per_sample_and_fractional_and_the_score():
    x, output = noise(0), noise(1)
    t = torch.tensor([3, 900])
    with pytest.raises(RuntimeError):
        DDPMScheduler().step(output, t, x)
    with pytest.raises((IndexError, RuntimeError, TypeError)):
        DDPMScheduler().step(output, 500.5, x)
    with pytest.raises(ValueError):
        DDPMScheduler(prediction_type="score").step(output, 500, x)
    DDPMScheduler(prediction_type="epsilonn")  # noticed only in step

    ours = VDMScheduler()
    together = ours.step(output, t, x, generator=torch.manual_seed(0))
    drawn = noise(0)
    for i, timestep in enumerate(t.tolist()):
        alone = ours.step(output[i : i + 1], timestep, x[i : i + 1], generator=torch.manual_seed(7))
        mean = alone.prev_sample - ours._get_variance(timestep).sqrt() * noise(7, (1, *IMAGE[1:]))
        expected = mean + ours._get_variance(timestep).sqrt() * drawn[i]
        assert (together.prev_sample[i] - expected).abs().max() < 1e-6
        assert (together.pred_original_sample[i] - alone.pred_original_sample).abs().max() < 1e-6

    # half-way in log SNR between two whole timesteps
    between = steps(ours, output, 500.5, x)
    neighbours = [steps(ours, output, i, x) for i in (500, 501)]
    assert (between - (neighbours[0] + neighbours[1]) / 2).abs().max() < 1e-4
    sigma = (-ours.log_snr(500)).sigmoid().sqrt().float()
    score = steps(VDMScheduler(prediction_type="score"), -output / sigma, 500, x)
    assert (score - steps(ours, output, 500, x)).abs().max() < 2e-6
    with pytest.raises(ValueError, match="prediction_type"):
        VDMScheduler(prediction_type="epsilonn")


def test_row_14_get_variance_returns_a_variance():
    predicted = torch.tensor([0.3], dtype=torch.float64)
    peer = DDPMScheduler()
    large = float(peer._get_variance(500, variance_type="fixed_large"))
    small = float(peer._get_variance(500, variance_type="fixed_small"))
    defect(
        float(peer._get_variance(500, variance_type="fixed_small_log")) != small,
        "mixes variance, deviation and logarithm",
    )
    assert float(peer._get_variance(500, variance_type="fixed_small_log")) == pytest.approx(math.sqrt(small), rel=1e-5)
    assert float(peer._get_variance(500, variance_type="fixed_large_log")) == pytest.approx(math.log(large), rel=1e-5)
    assert float(peer._get_variance(500, predicted, "learned_range")) < 0
    assert float(peer._get_variance(500, variance_type="nonsense")) == small  # accepted in silence
    assert math.isnan(steps(DDPMScheduler(trained_betas=[0.1, 1.3]), noise(0), 1, noise(1)).sum())

    ours = VDMScheduler()
    for kind in ("fixed_small", "fixed_small_log"):
        assert float(ours._get_variance(500, variance_type=kind)) == pytest.approx(small, rel=1e-4)
    for kind in ("fixed_large", "fixed_large_log"):
        assert float(ours._get_variance(500, variance_type=kind)) == pytest.approx(large, rel=1e-4)
    assert small < float(ours._get_variance(500, predicted, "learned_range")) < large
    with pytest.warns(UserWarning, match="nonsense.*fixed_small"):
        VDMScheduler(variance_type="nonsense")
    with pytest.warns(UserWarning, match="betas"):
        ours = VDMScheduler(num_train_timesteps=2, trained_betas=[0.1, 1.3])
    with pytest.raises(ValueError, match="undefined"):
        steps(ours, noise(0), 1, noise(1))


def test_row_15_the_previous_step_is_the_next_of_the_grid():
    """Deterministic steps between the timesteps that the model is really evaluated at."""
    x, output = noise(0), noise(1)
    config = {"timestep_spacing": "linspace", "clip_sample": False}
    alpha_bars = [float(a) for a in reference.alpha_bars(reference.betas("linear", 1000))] + [1.0]
    peer, ours = DDIMScheduler(set_alpha_to_one=True, **config), VDMScheduler(stochasticity=0.0, **config)
    peer.set_timesteps(10), ours.set_timesteps(10)
    assert peer.timesteps.tolist() == ours.timesteps.tolist()
    t = ours.timesteps.tolist()
    peer_errors = []
    for now, then in zip(t, [*t[1:], -1], strict=True):
        x_hat = (x.double() - math.sqrt(1 - alpha_bars[now]) * output) / math.sqrt(alpha_bars[now])
        exact = math.sqrt(alpha_bars[then]) * x_hat + math.sqrt(1 - alpha_bars[then]) * output
        peer_errors.append(float((peer.step(output, now, x).prev_sample - exact).abs().max()))
        size = float(x_hat.abs().max()) * math.sqrt(alpha_bars[then])
        assert (ours.step(output, now, x).prev_sample - exact).abs().max() < 1e-6 * max(1, size)
    wrong = sum(e > 1e-3 for e in peer_errors[:-1])
    defect(wrong > 0, "subtracts T // n")
    assert wrong == 9 and max(peer_errors) > 1


def test_row_16_karras_sigmas_need_no_begin_index():
    """The peer finds no timestep for its own first step; ours takes the same log SNRs as a grid of its own."""
    peer = DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True)
    peer.set_timesteps(20)
    x, output = noise(0), noise(1)
    try:
        for t in peer.timesteps:
            peer.step(output, t, x)
    except IndexError:
        pass
    else:
        pytest.skip("this release of Diffusers no longer raises there")
    ours = VDMScheduler(beta_schedule="squaredcos_cap_v2", stochasticity=0.0, multistep_order=2)
    low, high = float(ours.log_snr(999)), float(ours.log_snr(0))
    ramp = np.linspace(0, 1, 20)
    sigmas = (
        math.exp(-low / 14) + ramp * (math.exp(-high / 14) - math.exp(-low / 14))
    ) ** 7  # Karras et al. 2022, equation 5
    ours.set_timesteps(log_snrs=np.clip(-2 * np.log(sigmas), low, high))
    for t in ours.timesteps:
        x = steps(ours, output, t, x)
    assert len(ours.timesteps) == 20 and bool(x.isfinite().all())
