"""VDMScheduler's behaviour: configuration, grids, steps of every kind, what a step costs, what it refuses."""

import copy
import inspect
import json
import math
import pickle
import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from vdm_diffusers import VDMScheduler
from vdm_diffusers.gaussian import posterior_coefficients
from vdm_diffusers.noise_schedules import CosineSchedule, LinearLogSNRSchedule, TabulatedNoiseSchedule

SHAPE = (2, 3, 4, 5)
LOG_SNR = {"beta_schedule": "log_snr_linear"}


def noise(seed, shape=SHAPE, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sample_loop(scheduler, x, model, seed=0, device=None, **grid):
    """The loop of every pipeline."""
    scheduler.set_timesteps(device=device, **grid)
    kwargs = {} if seed is None else {"generator": torch.manual_seed(seed)}
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, scheduler.scale_model_input(x, t), **kwargs).prev_sample
    return x


def gaussian_model(scheduler, variance, prediction_type="sample"):
    """The exact denoiser of data N(0, variance I): E[x | z] = alpha variance z / (alpha^2 variance + sigma^2)."""

    def model(z, t):
        alpha, sigma = (f.sqrt() for f in (scheduler.log_snr(t).sigmoid(), (-scheduler.log_snr(t)).sigmoid()))
        x = alpha * variance / (alpha**2 * variance + sigma**2) * z
        return {"sample": x, "epsilon": (z - alpha * x) / sigma}[prediction_type].to(z.dtype)

    return model


# --- configuration ---------------------------------------------------------------------------------------------------


def test_the_keywords_and_defaults_are_ddpms():
    ours = inspect.signature(VDMScheduler.__init__).parameters
    for name in inspect.signature(DDPMScheduler.__init__).parameters:
        assert name in ours
    peer, scheduler = DDPMScheduler().config, VDMScheduler().config
    assert {k: scheduler[k] for k in peer if not k.startswith("_")} == {
        k: v for k, v in peer.items() if not k.startswith("_")
    }
    assert list(inspect.signature(VDMScheduler.step).parameters) == list(
        inspect.signature(DDPMScheduler.step).parameters
    )


def test_log_snr_schedules_have_their_own_defaults():
    config = VDMScheduler(**LOG_SNR).config
    assert (config.clip_sample, config.timestep_spacing) == (False, "trailing")
    config = VDMScheduler(**LOG_SNR, clip_sample=True, timestep_spacing="leading").config
    assert (config.clip_sample, config.timestep_spacing) == (True, "leading")
    again = VDMScheduler.from_config(VDMScheduler(**LOG_SNR).config)
    assert (again.config.clip_sample, again.config.timestep_spacing, again.is_log_snr_schedule) == (
        False,
        "trailing",
        True,
    )


OWN = [
    {},
    LOG_SNR,
    {
        "beta_schedule": "log_snr_cosine",
        "log_snr_max": 12.0,
        "log_snr_min": -7.0,
        "log_snr_shift": -2.0,
        "stochasticity": 0.5,
        "multistep_order": 2,
        "variance_type": "optimal",
        "optimal_variance": {"log_snr": [-5.0, 0.0, 10.0], "mse": [0.9, 0.4, 0.01]},
        "final_step": "mean",
    },
    {**LOG_SNR, "log_snr_table": [13.0, 9.0, 2.0, -4.5]},
    {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3, "prediction_type": "flow_prediction"},
]


@pytest.mark.parametrize("config", OWN, ids=str)
def test_save_and_load(tmp_path, config):
    scheduler = VDMScheduler(**config)
    scheduler.save_pretrained(tmp_path)
    text = (tmp_path / "scheduler_config.json").read_text()
    assert json.loads(text)["_class_name"] == "VDMScheduler"
    loaded = VDMScheduler.from_pretrained(tmp_path)
    grid = {"num_inference_steps": 3}
    for s in (scheduler, loaded):
        s.set_timesteps(**grid)
    x, output = noise(0), noise(1)
    for t in scheduler.timesteps:
        a, b = (s.step(output, t, x, generator=torch.manual_seed(0)).prev_sample for s in (scheduler, loaded))
        assert torch.equal(a, b)
    for twin in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert torch.equal(twin.timesteps, scheduler.timesteps) and twin.config == scheduler.config


def test_own_keys_survive_a_visit_to_diffusers_in_silence(tmp_path, caplog):
    scheduler = VDMScheduler(
        stochasticity=0.0, multistep_order=2, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )
    scheduler.save_pretrained(tmp_path)
    for source in (scheduler, VDMScheduler.from_pretrained(tmp_path)):
        for name in ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
            with caplog.at_level("WARNING", logger="diffusers.configuration_utils"):
                diffusers.utils.logging.enable_propagation()
                visitor = getattr(diffusers, name).from_config(source.config)
                back = VDMScheduler.from_config(visitor.config)
                diffusers.utils.logging.disable_propagation()
            assert (back.config.stochasticity, back.config.multistep_order) == (0.0, 2)
            assert visitor.config.prediction_type == back.config.prediction_type == "v_prediction"
    assert not caplog.records


def test_dpm_solver_configurations_do_not_switch_the_sampler():
    config = dict(DPMSolverMultistepScheduler(solver_order=2, algorithm_type="dpmsolver++").config)
    config.pop("_use_default_values", None)  # as after loading from a file: every key explicit
    scheduler = VDMScheduler.from_config(config)
    assert (scheduler.config.multistep_order, scheduler.config.stochasticity) == (1, 1.0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "noise"}, "prediction_type"),
        ({"timestep_spacing": "even"}, "timestep_spacing"),
        ({"beta_schedule": "quadratic"}, "linear"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"stochasticity": -0.5}, "stochasticity"),
        ({"multistep_order": 3}, "multistep_order"),
        ({"final_step": "clean"}, "final_step"),
        ({"variance_type": "optimal"}, "optimal_variance"),
        ({"variance_type": "optimal", "optimal_variance": {"log_snr": [1.0], "mse": []}}, "one length"),
        ({**LOG_SNR, "log_snr_max": -5.0, "log_snr_min": 13.3}, "Did you pass gamma"),
        ({**LOG_SNR, "log_snr_max": math.inf}, "finite"),
        ({**LOG_SNR, "log_snr_table": [14.0, 0.0]}, "log_snr_table"),
        ({**LOG_SNR, "log_snr_table": [0.0, 3.0]}, "must decrease"),
        ({"log_snr_table": [3.0, 0.0]}, "log_snr_table"),
    ],
    ids=str,
)
def test_construction_refuses(config, message):
    with pytest.raises(ValueError, match=message):
        VDMScheduler(**config)


def test_odd_tables_warn_and_raise_only_where_they_are_undefined():
    with pytest.warns(UserWarning, match="2 entries"):
        scheduler = VDMScheduler(trained_betas=np.array([0.1, 0.3]))
    assert scheduler.timesteps.tolist() == [1, 0] and scheduler.betas.tolist() == pytest.approx([0.1, 0.3])
    with pytest.warns(UserWarning, match="betas"):
        scheduler = VDMScheduler(beta_start=0.1, beta_end=2.0)
    assert bool(scheduler.step(noise(0), 0, noise(1)).prev_sample.isfinite().all())
    for timestep in (900, torch.tensor([0, 900])):
        with pytest.raises(ValueError, match="undefined"):
            scheduler.step(noise(0), timestep, noise(1))


# --- the schedule ----------------------------------------------------------------------------------------------------


def test_noise_schedules():
    assert isinstance(VDMScheduler().noise_schedule, TabulatedNoiseSchedule)
    assert VDMScheduler(**LOG_SNR).noise_schedule == LinearLogSNRSchedule(13.3, -5.0)
    assert VDMScheduler(beta_schedule="log_snr_cosine").noise_schedule == CosineSchedule(13.3, -5.0)
    shifted = VDMScheduler(
        beta_schedule="log_snr_cosine", log_snr_shift=-2.0, log_snr_max=19.0, log_snr_min=-20.0
    ).noise_schedule
    assert (shifted.log_snr_max, shifted.log_snr_min) == (19.0, -20.0)
    unlimited = CosineSchedule(math.inf, -math.inf)
    middle = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64)
    assert (shifted.log_snr(middle) - (unlimited.log_snr(middle) - 2)).abs().max() < 1e-3
    learned = VDMScheduler(**LOG_SNR, log_snr_table=[13.0, 9.0, 2.0, -4.5])
    assert learned.noise_schedule.log_snr(1 / 3) == 9.0


def test_a_learned_schedule_places_the_steps_and_leaves_the_timesteps_their_meaning():
    plain, learned = VDMScheduler(**LOG_SNR), VDMScheduler(**LOG_SNR, log_snr_table=[13.0, 9.0, 2.0, -4.5])
    learned.set_timesteps(3)
    assert torch.allclose(
        learned.log_snr(learned.timesteps), torch.tensor([-4.5, 2.0, 9.0], dtype=torch.float64), atol=1e-5
    )
    t = torch.linspace(-1, 999, 7)
    assert torch.equal(plain.log_snr(t), learned.log_snr(t))
    assert float(learned.log_snr(learned.previous_timestep(learned.timesteps)[-1])) == pytest.approx(13.0, abs=1e-5)


@pytest.mark.parametrize("timestep", [-2, 1000, 999.5, -0.5, math.nan])
def test_log_snr_refuses_what_is_outside(timestep):
    with pytest.raises(ValueError, match="timesteps must lie in"):
        VDMScheduler().log_snr(timestep)


def test_timestep_from_log_snr():
    table = VDMScheduler()
    assert table.timestep_from_log_snr(math.inf) == -1
    t = torch.tensor([0.0, 0.5, 700.0, 999.0], dtype=torch.float64)
    assert torch.allclose(table.timestep_from_log_snr(table.log_snr(t)), t, atol=1e-9, rtol=0)
    for outside in (20.0, -20.0):
        for scheduler in (table, VDMScheduler(**LOG_SNR)):
            with pytest.raises(ValueError, match="range of the schedule"):
                scheduler.timestep_from_log_snr(outside)
    ends = torch.tensor([13.3, -5.0], dtype=torch.float32)  # 13.3 is a little more than 13.3 there
    assert VDMScheduler(**LOG_SNR).timestep_from_log_snr(ends).tolist() == [-1, 999]
    assert VDMScheduler(num_train_timesteps=1).timestep_from_log_snr(math.inf) == -1


@pytest.mark.parametrize(
    "config", [LOG_SNR, {"beta_schedule": "log_snr_cosine", "log_snr_max": 9.0, "num_train_timesteps": 128}]
)
def test_as_discrete_tells_diffusers_the_same_schedule(config):
    scheduler = VDMScheduler(**config, prediction_type="v_prediction")
    discrete = scheduler.as_discrete()
    t = torch.arange(scheduler.config.num_train_timesteps)
    exact = scheduler.log_snr(t)
    assert (discrete.log_snr(t) - exact).abs().max() < 0.01
    assert discrete.noise_schedule.log_snr_max > discrete.noise_schedule.log_snr_min  # strictly decreasing
    for name in (
        "DDPMScheduler",
        "DDIMScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "EulerDiscreteScheduler",
    ):
        peer = getattr(diffusers, name).from_config(discrete.config)
        alpha_bar = peer.alphas_cumprod.double()
        error = (alpha_bar.log() - torch.log1p(-alpha_bar) - exact).abs()
        assert bool((error <= 2.0**-23 * (2 + exact.exp() + (-exact).exp())).all())
        assert error.max() < 0.015
        assert peer.config.prediction_type == "v_prediction"
        assert name == "EulerDiscreteScheduler" or not peer.config.get("clip_sample", False)
        peer.set_timesteps(8)
        assert float(peer.timesteps[0]) == t[-1]  # trailing
    table = VDMScheduler(beta_schedule="scaled_linear")
    assert torch.equal(table.as_discrete().log_snr(t), table.log_snr(t))


# --- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("total", "offset"), [(1000, 0), (1000, 1), (10, 7), (1, 0)])
def test_every_number_of_steps(spacing, total, offset):
    scheduler = VDMScheduler(num_train_timesteps=total, timestep_spacing=spacing, steps_offset=offset)
    for n in {*range(1, min(total, 70) + 1), *range(1, total + 1, 13), total}:
        scheduler.set_timesteps(n)
        t = scheduler.timesteps
        assert t.dtype == torch.int64 and len(t) == n
        assert 0 <= int(t[-1]) and int(t[0]) <= total - 1 and bool((t.diff() < 0).all())
    with pytest.raises(ValueError, match="exceed"):
        scheduler.set_timesteps(total + 1)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("n", [1, 2, 7, 1000, 2500])
def test_every_number_of_steps_in_log_snr(spacing, n):
    scheduler = VDMScheduler(**LOG_SNR, timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(n)
    t = scheduler.timesteps
    assert t.dtype == torch.float32 and len(t) == n and bool((t.diff() < 0).all()) and -1 < t[-1] and t[0] <= 999
    if spacing == "trailing":
        assert t[0] == 999 and torch.allclose(
            t.double(), 1000 * torch.arange(n, 0, -1).double() / n - 1, atol=1e-4, rtol=0
        )


def test_the_three_ways_to_choose_steps():
    scheduler = VDMScheduler()
    scheduler.set_timesteps(timesteps=[999, 500, 0])
    assert (
        scheduler.timesteps.dtype == torch.int64 and scheduler.custom_timesteps and scheduler.num_inference_steps == 3
    )
    scheduler.set_timesteps(timesteps=torch.tensor([999.0, 500.5, 0.25]))
    assert scheduler.timesteps.dtype == torch.float32 and scheduler.timesteps.tolist() == [999.0, 500.5, 0.25]
    wanted = torch.tensor([-8.0, -3.0, 1.5, 7.0], dtype=torch.float64)
    scheduler.set_timesteps(log_snrs=wanted)
    assert torch.allclose(scheduler.log_snr(scheduler.timesteps), wanted, atol=1e-5, rtol=0)
    scheduler.timesteps = torch.tensor([700, 300])  # as some pipelines do
    assert scheduler.previous_timestep(700) == 300
    for bad in ({}, {"num_inference_steps": 3, "timesteps": [3]}, {"timesteps": [3], "log_snrs": [0.0]}):
        with pytest.raises(ValueError, match="exactly one"):
            scheduler.set_timesteps(**bad)
    for bad, message in [
        ({"num_inference_steps": 0}, "positive"),
        ({"num_inference_steps": 2.5}, "positive"),
        ({"timesteps": []}, "at least one"),
        ({"timesteps": [1, 2]}, "descending"),
        ({"timesteps": [5, 5]}, "descending"),
        ({"timesteps": [1000, 5]}, "lie in"),
        ({"timesteps": [5, -1]}, "above -1"),
        ({"log_snrs": [3.0, 0.0]}, "descending"),
        ({"log_snrs": [-30.0, 0.0]}, "range"),
    ]:
        with pytest.raises(ValueError, match=message):
            scheduler.set_timesteps(**bad)


def test_a_flow_configuration_is_refused_before_it_samples_nonsense():
    config = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True).config
    with pytest.raises(ValueError, match="flow"):
        VDMScheduler.from_config(config).set_timesteps(3)


def test_previous_timestep():
    scheduler = VDMScheduler()
    assert scheduler.previous_timestep(7) == 6 and scheduler.previous_timestep(0) == -1
    scheduler.set_timesteps(timesteps=[900, 400, 5])
    assert [scheduler.previous_timestep(t) for t in (900, 5, 401, 0.5)] == [400, -1, 400, -1]
    t = torch.tensor([[900, 5], [401, 0]])
    previous = scheduler.previous_timestep(t)
    assert previous.tolist() == [[400, -1], [400, -1]] and previous.dtype == torch.int64
    continuous = VDMScheduler(**LOG_SNR)
    assert continuous.previous_timestep(torch.tensor([0.5, 10.25])).tolist() == [-0.5, 9.25]


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"clip_sample": False},
        {"thresholding": True, "sample_max_value": 1.5},
        {"variance_type": "fixed_large"},
        {"variance_type": "learned_range"},
    ],
    ids=str,
)
def test_same_loop_as_ddpm_where_ddpm_is_right(prediction_type, config):
    peer = DDPMScheduler(prediction_type=prediction_type, beta_schedule="scaled_linear", **config)
    ours = VDMScheduler.from_config(peer.config)
    learned = config.get("variance_type") == "learned_range"

    def model(x, t):
        return torch.cat([0.4 * x, 0.3 * x.clamp(-1, 1)], dim=1) if learned else 0.4 * x

    results = [sample_loop(s, noise(0), model, num_inference_steps=20) for s in (peer, ours)]
    assert (results[0] - results[1]).abs().max() < 5e-5


def test_deterministic_steps_are_ddims():
    peer = DDIMScheduler(clip_sample=False, timestep_spacing="leading")
    ours = VDMScheduler.from_config(peer.config, stochasticity=0.0)
    results = [sample_loop(s, noise(0), lambda x, t: 0.4 * x, num_inference_steps=20) for s in (peer, ours)]
    assert (results[0] - results[1]).abs().max() < 5e-5
    ours = VDMScheduler.from_config(peer.config, stochasticity=0.3)
    peer.set_timesteps(20), ours.set_timesteps(20)
    for t in ours.timesteps[:-1]:
        a = peer.step(noise(1), int(t), noise(0), eta=0.3, generator=torch.manual_seed(0)).prev_sample
        b = ours.step(noise(1), t, noise(0), generator=torch.manual_seed(0)).prev_sample
        assert (a - b).abs().max() < 2e-4 * max(1, float(a.abs().max()))


@pytest.mark.parametrize("stochasticity", [0.0, 0.4, 1.0, 1.3, 50.0])
@pytest.mark.parametrize("grid", [{"num_inference_steps": 7}, {"log_snrs": [-5.0, -1.0, 0.5, 12.0]}], ids=str)
def test_marginals_are_kept_by_every_stochasticity(stochasticity, grid):
    """With the true x the step maps q(z_t | x) to q(z_s | x) exactly: mean and variance, in closed form."""
    scheduler = VDMScheduler(**LOG_SNR, prediction_type="sample", stochasticity=stochasticity)
    scheduler.set_timesteps(**grid)
    for timestep in scheduler.timesteps:
        t, s = scheduler.log_snr(timestep), scheduler.log_snr(scheduler.previous_timestep(timestep))
        zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)

        def step(z, x, timestep=timestep):
            return scheduler.step(x, timestep, z, generator=torch.manual_seed(0)).prev_sample

        drawn = noise(0, (1, 1), torch.float64)
        added = step(zero, zero)
        z_coefficient, x_coefficient, deviation = step(one, zero) - added, step(zero, one) - added, added / drawn
        mean = z_coefficient * t.sigmoid().sqrt() + x_coefficient
        variance = z_coefficient**2 * (-t).sigmoid() + deviation**2
        assert torch.allclose(mean, s.sigmoid().sqrt(), rtol=1e-12)
        assert torch.allclose(variance, (-s).sigmoid().reshape(1, 1), rtol=1e-10)
        assert stochasticity > 0 or float(deviation) == 0
        if stochasticity == 1:
            c = posterior_coefficients(t, s)
            assert torch.allclose(deviation**2, c.variance, rtol=1e-10) and torch.allclose(
                z_coefficient, c.z, rtol=1e-12
            )


def test_final_step():
    x, z = noise(0), noise(1)
    latent, mean = (VDMScheduler(**LOG_SNR, prediction_type="sample", final_step=f) for f in ("latent", "mean"))
    latent.set_timesteps(5), mean.set_timesteps(5)
    assert torch.allclose(mean.step(x, mean.timesteps[-1], z).prev_sample, x)
    draws = [latent.step(x, latent.timesteps[-1], z, generator=torch.manual_seed(i)).prev_sample for i in (0, 1)]
    assert not torch.equal(*draws)
    for t in latent.timesteps[:-1]:
        a, b = (s.step(x, t, z, generator=torch.manual_seed(0)).prev_sample for s in (latent, mean))
        assert torch.equal(a, b)
    expected, variance = latent.posterior_mean_variance(z, x, latent.timesteps[-1], -1)
    assert (draws[0] - (expected + variance.sqrt() * noise(0)).float()).abs().max() < 1e-6


def test_optimal_variance():
    table = {"log_snr": [0.0, -4.0, 10.0], "mse": [0.5, 1.0, 0.25]}  # in any order
    scheduler = VDMScheduler(**LOG_SNR, variance_type="optimal", optimal_variance=table)
    small = VDMScheduler(**LOG_SNR)
    for s in (scheduler, small):
        s.set_timesteps(log_snrs=[-4.5, -2.0, 5.0, 12.0])
    for t, mse in zip(scheduler.timesteps, [1.0, 0.5**0.5, 0.125**0.5, 0.25], strict=True):
        c = posterior_coefficients(scheduler.log_snr(t), scheduler.log_snr(scheduler.previous_timestep(t)))
        expected = c.variance + c.x**2 * mse
        assert float(scheduler._get_variance(t)) == pytest.approx(float(expected), rel=1e-6)
        added = [
            s.step(noise(1), t, noise(2), generator=torch.manual_seed(0)).prev_sample
            - s.step(noise(1), t, noise(2), generator=torch.manual_seed(1)).prev_sample
            for s in (scheduler, small)
        ]
        ratio = float(added[0].norm() / added[1].norm())
        assert ratio == pytest.approx(float((expected / c.variance).sqrt()), rel=1e-4)


@pytest.mark.parametrize(
    "config", [{}, LOG_SNR, {"clip_sample": False, "variance_type": "learned_range"}, {"stochasticity": 0.0}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_timesteps_per_sample_are_the_single_ones(config, dtype):
    scheduler = VDMScheduler(**config)
    scheduler.set_timesteps(9)
    t = scheduler.timesteps[[2, 8, 5]]
    x = noise(0, (3, 2, 4), dtype)
    output = noise(1, (3, 4, 4) if config.get("variance_type") == "learned_range" else (3, 2, 4), dtype)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    together = scheduler.step(output, t, x, generator=generators)
    for i in range(3):
        alone = scheduler.step(output[i : i + 1], t[i], x[i : i + 1], generator=torch.manual_seed(i))
        assert together.prev_sample.dtype == alone.prev_sample.dtype == dtype
        for a, b in zip(together.values(), alone.values(), strict=True):
            size = float(b.abs().max())
            assert (a[i] - b[0]).abs().max() <= 4 * torch.finfo(dtype).eps * max(1, size)
    means = scheduler.batch_step_no_noise(output, t, x)
    still = scheduler.step(output, t, x, generator=[torch.Generator().manual_seed(i) for i in range(3)]).prev_sample
    assert torch.allclose(means[1], still[1], atol=1e-2 if dtype == torch.bfloat16 else 1e-5) or config == LOG_SNR


def test_timesteps_may_come_in_any_order_and_kind():
    scheduler = VDMScheduler()
    scheduler.set_timesteps(10)
    x, output = noise(0), noise(1)
    values = {
        int(t): scheduler.step(output, t, x, generator=torch.manual_seed(0)).prev_sample for t in scheduler.timesteps
    }
    for t in reversed(values):  # backwards, repeated, as other types
        for kind in (int, float, np.int64, torch.tensor, lambda v: torch.tensor([v], dtype=torch.int32)):
            again = scheduler.step(output, kind(t), x, generator=torch.manual_seed(0)).prev_sample
            assert torch.equal(again, values[t])
    with pytest.raises(ValueError, match="not one of the 10"):
        scheduler.step(output, 123, x)
    with pytest.raises(ValueError, match="lie in"):
        scheduler.step(output, 1000, x)
    with pytest.raises(ValueError, match="timestep"):
        scheduler.step(output, -1, x)


def test_fractional_steps_of_the_training_chain():
    scheduler = VDMScheduler(**LOG_SNR, prediction_type="sample")
    x, z = noise(0), noise(1)
    for timestep in (500.5, 0.25, -0.5):
        mean, variance = scheduler.posterior_mean_variance(z, x, timestep, max(timestep - 1, -1))
        expected = mean + variance.sqrt() * noise(0)
        out = scheduler.step(x, timestep, z, generator=torch.manual_seed(0)).prev_sample
        assert (out - expected).abs().max() < 1e-6
        both = scheduler.step(x, torch.tensor([timestep, 3.0]), z, generator=torch.manual_seed(0)).prev_sample
        assert (both[0] - expected[0]).abs().max() < 1e-6


def test_image_to_image_begins_where_it_is_told():
    scheduler = VDMScheduler(multistep_order=2, stochasticity=0.0)
    scheduler.set_timesteps(10)
    assert (scheduler.begin_index, scheduler.step_index) == (None, None)
    scheduler.set_begin_index(6)
    first = scheduler.step(noise(1), scheduler.timesteps[6], noise(0)).prev_sample  # no history: first order
    plain = VDMScheduler(stochasticity=0.0)
    plain.set_timesteps(10)
    assert torch.allclose(first, plain.step(noise(1), plain.timesteps[6], noise(0)).prev_sample)
    assert (scheduler.begin_index, scheduler.step_index) == (6, 7)


def test_add_noise_and_velocity():
    for scheduler, t in (
        (VDMScheduler(), [3, 900]),
        (VDMScheduler(**LOG_SNR), [3.25, 900.5]),
        (VDMScheduler(), [3.25, 900.5]),
    ):
        t = torch.tensor(t)
        alpha, sigma = (f.sqrt().float() for f in (scheduler.log_snr(t).sigmoid(), (-scheduler.log_snr(t)).sigmoid()))
        alpha, sigma = alpha.reshape(2, 1, 1, 1), sigma.reshape(2, 1, 1, 1)
        x, eps = noise(0), noise(1)
        assert torch.allclose(scheduler.add_noise(x, eps, t), alpha * x + sigma * eps, atol=1e-6)
        assert torch.allclose(scheduler.get_velocity(x, eps, t), alpha * eps - sigma * x, atol=1e-6)
        assert torch.equal(scheduler.add_noise(x, eps, t[:1])[0], scheduler.add_noise(x, eps, t)[0])  # one for all
        assert torch.equal(scheduler.add_noise(x, eps, t[:, None]), scheduler.add_noise(x, eps, t))
        assert torch.equal(scheduler.add_noise(x, eps, float(t[0]))[0], scheduler.add_noise(x, eps, t)[0])
        with pytest.raises(ValueError):
            scheduler.add_noise(x, eps, torch.tensor([3, 4, 5]))
        with pytest.raises(ValueError, match="lie in"):
            scheduler.add_noise(x, eps, torch.tensor([1000]))
        with pytest.raises(ValueError, match="same shape"):
            scheduler.add_noise(x, eps[:, :1], t)
    assert torch.equal(VDMScheduler().add_noise(x, eps, torch.tensor([-1])), x)


def test_convert_prediction():
    scheduler = VDMScheduler(prediction_type="v_prediction")
    x, eps, t = noise(0), noise(1), torch.tensor([3, 700])
    z, v = scheduler.add_noise(x, eps, t), scheduler.get_velocity(x, eps, t)
    assert torch.allclose(scheduler.convert_prediction(v, t, z, target="sample"), x, atol=1e-5)
    assert torch.allclose(scheduler.convert_prediction(v, t, z, target="epsilon"), eps, atol=1e-5)
    with pytest.raises(ValueError, match="prediction_type"):
        scheduler.convert_prediction(v, t, z, target="noise")


def test_a_step_refuses():
    scheduler, x = VDMScheduler(), noise(0)
    for output, message in [
        (noise(1, (2, 6, 4, 5)), "twice its channels"),
        (noise(1, (1, 3, 4, 5)), "shape"),
        (torch.ones(SHAPE, dtype=torch.int64), "floating-point"),
    ]:
        with pytest.raises(ValueError, match=message):
            scheduler.step(output, 3, x)
    with pytest.raises(ValueError, match="twice the sample's channels"):
        VDMScheduler(variance_type="learned").step(x, 3, x)
    with pytest.raises(ValueError, match="one timestep for the whole batch"):
        VDMScheduler(multistep_order=2).step(x, torch.tensor([3, 4]), x)
    with pytest.raises(ValueError, match="does not go with"):
        scheduler.step(x, torch.tensor([3, 4, 5]), x)


def test_gradients_pass_through_a_step_and_its_inputs_stay():
    scheduler = VDMScheduler()
    output, x = noise(1).requires_grad_(), noise(0).requires_grad_()
    before = output.detach().clone(), x.detach().clone()
    scheduler.step(output, 500, x).prev_sample.sum().backward()
    assert output.grad is not None and x.grad is not None and bool(x.grad.abs().sum() > 0)
    assert torch.equal(before[0], output) and torch.equal(before[1], x)


def test_what_is_made_in_inference_mode_serves_in_training():
    scheduler = VDMScheduler()
    with torch.inference_mode():
        scheduler.set_timesteps(10)
        scheduler.add_noise(noise(0), noise(1), torch.tensor([3, 4]))
    x = noise(0).requires_grad_()
    scheduler.add_noise(x, noise(1), torch.tensor([3, 4])).sum().backward()
    scheduler.step(noise(1), scheduler.timesteps[[0, 3]], x).prev_sample.sum().backward()
    assert x.grad is not None and bool((x.grad != 0).all())


# --- what a step costs -----------------------------------------------------------------------------------------------


class Kernels(TorchDispatchMode):
    """Counts what reaches the device: views are free; a value read back to the host is a synchronisation."""

    FREE = {
        "view",
        "_unsafe_view",
        "slice",
        "select",
        "alias",
        "detach",
        "expand",
        "split",
        "unsqueeze",
        "reshape",
        "unbind",
        "as_strided",
    }
    SYNC = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "item"}

    def __init__(self):
        super().__init__()
        self.kernels, self.syncs = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        tensors = [v for v in (*args, out) if isinstance(v, torch.Tensor)]
        if any(v.device.type == "meta" for v in tensors):
            if name in self.SYNC or len({v.device for v in tensors if v.ndim}) > 1:
                self.syncs.append(name)
            elif name not in self.FREE:
                self.kernels.append(name)
        assert not (isinstance(out, torch.Tensor) and out.device.type == "meta" and out.dtype == torch.float64), name
        return out


@pytest.mark.parametrize(
    ("config", "most"),
    [
        ({}, 7),
        ({"clip_sample": False}, 6),
        ({**LOG_SNR}, 6),
        ({"prediction_type": "v_prediction"}, 7),
        ({"prediction_type": "sample"}, 7),
        ({"variance_type": "fixed_large", "timestep_spacing": "trailing"}, 7),
        ({"clip_sample": False, "stochasticity": 0.0}, 4),
        ({**LOG_SNR, "stochasticity": 0.0, "multistep_order": 2}, 5),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["own", "slice", "foreign"])
def test_a_sampling_loop_launches_few_kernels_and_never_waits(config, most, dtype, kind):
    """On the meta device, whose values cannot be read and which stands for one without float64 here."""
    scheduler = VDMScheduler(**config)
    x, output = (torch.empty(2, 3, 4, 5, device="meta", dtype=dtype) for _ in range(2))
    with Kernels() as grid:
        scheduler.set_timesteps(12, device="meta")
    assert set(grid.syncs) == {"_to_copy"}  # timesteps and coefficients go to the device once; nothing comes back
    timesteps, begin = scheduler.timesteps, 0
    if kind != "own":
        begin = 4
        timesteps = scheduler.timesteps[begin:]
    if kind == "foreign":
        scheduler.set_begin_index(begin)
        timesteps = timesteps.to(torch.int32)
    for i, t in enumerate(timesteps):
        with Kernels() as step:
            x = scheduler.step(output, t, x, return_dict=False)[0]
        assert not step.syncs and len(step.kernels) <= most, step.kernels
        assert scheduler.step_index == begin + i + 1 and x.dtype == dtype
    if kind == "foreign":
        with pytest.raises(ValueError, match="all 12 steps are taken"):
            scheduler.step(output, timesteps[0], x)


def test_add_noise_never_waits():
    for scheduler, t in ((VDMScheduler(), torch.zeros(2, device="meta", dtype=torch.int64)),):
        x = torch.empty(SHAPE, device="meta")
        scheduler.add_noise(x, x, t)
        with Kernels() as counted:
            scheduler.add_noise(x, x, t)
            scheduler.get_velocity(x, x, t)
        assert not counted.syncs and len(counted.kernels) <= 11


@pytest.mark.parametrize(
    "config",
    [
        {},
        LOG_SNR,
        {"clip_sample": False, "stochasticity": 0.0},
        {**LOG_SNR, "stochasticity": 0.0, "multistep_order": 2},
    ],
    ids=str,
)
def test_a_step_compiles_whole(config):
    eager, scheduler = VDMScheduler(**config), VDMScheduler(**config)
    eager.set_timesteps(6), scheduler.set_timesteps(6)
    compiled = torch.compile(
        lambda output, t, x: scheduler.step(output, t, x, return_dict=False), fullgraph=True, backend="aot_eager"
    )
    x = y = noise(0)
    for t in eager.timesteps:
        torch.manual_seed(0)
        x = eager.step(0.3 * x, t, x, return_dict=False)[0]
        torch.manual_seed(0)
        y = compiled(0.3 * y, t, y)[0]
        assert (x - y).abs().max() < 1e-5 * max(1, float(x.abs().max()))


@pytest.mark.slow
def test_a_step_compiles_with_inductor_and_for_timesteps_per_sample():
    scheduler = VDMScheduler(stochasticity=0.0)
    scheduler.set_timesteps(6)
    compiled = torch.compile(lambda output, t, x: scheduler.step(output, t, x, return_dict=False)[0], fullgraph=True)
    for t in (*scheduler.timesteps, scheduler.timesteps[[1, 4]]):
        expected = scheduler.step(noise(1), t, noise(0), return_dict=False)[0]
        assert torch.allclose(compiled(noise(1), t, noise(0)), expected, atol=1e-5, rtol=1e-5)


# --- samplers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon"])
@pytest.mark.parametrize(("order", "grids"), [(1, (64, 128)), (2, (64, 128))])
def test_order_of_convergence(order, grids, prediction_type):
    """Deterministic sampling of a Gaussian: z_0 is the initial value times the ratio of the two standard
    deviations.
    """
    variance = 0.3
    errors = []
    for n in grids:
        scheduler = VDMScheduler(
            **LOG_SNR, log_snr_max=6.0, stochasticity=0.0, multistep_order=order, prediction_type=prediction_type
        )
        one = torch.ones(1, 1, dtype=torch.float64)
        z_0 = sample_loop(scheduler, one, gaussian_model(scheduler, variance, prediction_type), num_inference_steps=n)
        ends = scheduler.log_snr([999.0, -1.0])
        deviation = (ends.sigmoid() * variance + (-ends).sigmoid()).sqrt()
        errors.append(abs(float(z_0) / float(deviation[1] / deviation[0]) - 1))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(
    "config", [{}, LOG_SNR, {"variance_type": "fixed_large", "timestep_spacing": "trailing"}], ids=str
)
def test_ancestral_sampling_of_a_gaussian(config):
    """The exact denoiser of a Gaussian is linear, so the variance after n steps is known; a run has it within 5
    standard errors.
    """
    variance, n = 0.5, 40_000
    scheduler = VDMScheduler(prediction_type="sample", clip_sample=False, **config)
    x = sample_loop(scheduler, noise(5, (n, 1)), gaussian_model(scheduler, variance), num_inference_steps=20)
    expected = 1.0
    for timestep in scheduler.timesteps:
        t, s = scheduler.log_snr(timestep), scheduler.log_snr(scheduler.previous_timestep(timestep))
        c, alpha = posterior_coefficients(t, s), float(t.sigmoid().sqrt())
        x_hat = alpha * variance / (alpha**2 * variance + 1 - alpha**2)
        large = float(1 - t.sigmoid() / s.sigmoid()) if s.isfinite() else 0.0
        added = large if config.get("variance_type") == "fixed_large" else float(c.variance)
        expected = float(c.z + c.x * x_hat) ** 2 * expected + added
    assert float(x.var()) == pytest.approx(expected, rel=5 * math.sqrt(2 / n))
    assert abs(float(x.mean())) < 5 * math.sqrt(expected / n)


def test_diffusers_samplers_sample_a_log_snr_model_through_as_discrete():
    variance = 0.3
    scheduler = VDMScheduler(**LOG_SNR)
    model = gaussian_model(scheduler, variance, "epsilon")  # knows nothing of the table: timesteps mean the same
    discrete = scheduler.as_discrete()
    for name, n in [("DPMSolverMultistepScheduler", 50), ("DDIMScheduler", 200), ("UniPCMultistepScheduler", 50)]:
        peer = getattr(diffusers, name).from_config(discrete.config)
        out = sample_loop(peer, torch.ones(1, 1, dtype=torch.float64), model, seed=None, num_inference_steps=n)
        start = scheduler.log_snr(999)
        expected = math.sqrt(variance / float(start.sigmoid() * variance + (-start).sigmoid()))
        assert float(out) == pytest.approx(expected, rel=0.02), name


def test_what_diffusers_does_with_a_log_snr_configuration():
    """Documented in docs/scheduler.md: the schedule's name is refused loudly by every class."""
    config = VDMScheduler(**LOG_SNR).config
    for name in (
        "DDPMScheduler",
        "DDIMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
        "UniPCMultistepScheduler",
    ):
        with pytest.raises(NotImplementedError, match="log_snr_linear"):
            getattr(diffusers, name).from_config(config)
    # what no class knows by name is refused in step, not misread
    config = VDMScheduler(**LOG_SNR, prediction_type="score").as_discrete().config
    for name in ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        scheduler = getattr(diffusers, name).from_config(config)
        scheduler.set_timesteps(5)
        with pytest.raises(ValueError, match="prediction_type"):
            assert scheduler.step(noise(0), scheduler.timesteps[0], noise(1)).prev_sample.isfinite().all()


def test_the_road_of_a_score_model_to_diffusers_samplers():
    """as_discrete() for the schedule, convert_prediction for the model's output: docs/scheduler.md."""
    variance = 0.3
    ours = VDMScheduler(**LOG_SNR, prediction_type="score")
    epsilon = gaussian_model(ours, variance, "epsilon")

    def score_model(z, t):
        return (-epsilon(z, t) / (-ours.log_snr(t)).sigmoid().sqrt()).to(z.dtype)

    peer = DPMSolverMultistepScheduler.from_config(ours.as_discrete().config, prediction_type="epsilon")
    results = [
        sample_loop(peer, noise(0), model, seed=None, num_inference_steps=10)
        for model in (lambda z, t: ours.convert_prediction(score_model(z, t), t, z, target="epsilon"), epsilon)
    ]
    assert torch.allclose(*results, atol=1e-5)


def test_no_warnings_from_ordinary_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for config in OWN:
            scheduler = VDMScheduler(**config)
            scheduler.set_timesteps(2)
            assert scheduler.step(noise(0), scheduler.timesteps[0], noise(1)).prev_sample.isfinite().all()
