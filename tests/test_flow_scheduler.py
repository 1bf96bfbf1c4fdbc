"""Flow matching and sigma space: the peers' samples by default, the exact maths of the paths, one bound on every
path.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from exact_models import GaussianMixture, alpha_sigma

from vdm_diffusers import (
    VDMFlowScheduler,
    VDMScheduler,
    VDMSigmaScheduler,
    estimate_optimal_variance,
    evaluate_likelihood,
)
from vdm_diffusers.noise_schedules import FlowSchedule, KarrasSchedule
from vdm_diffusers.objectives import diffusion_loss
from vdm_diffusers.timelines import FlowTimeline, SigmaTimeline

CONFIGS = {
    "defaults": {},
    "shift": {"shift": 3.0},
    "dynamic": {"use_dynamic_shifting": True},
    "dynamic, linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "terminal": {"shift_terminal": 0.1},
    "inverted": {"invert_sigmas": True},
    "Karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True, "shift": 2.0},
    "beta": {"use_beta_sigmas": True},
    "stochastic": {"stochastic_sampling": True},
}
GRIDS = {
    "number": {"num_inference_steps": 7},
    "sigmas": {"sigmas": np.linspace(1, 1 / 7, 7)},
    "timesteps": {"timesteps": np.linspace(1000, 10, 5)},
    "both": {"sigmas": [1.0, 0.5, 0.2], "timesteps": [900.0, 500.0, 100.0]},
}


def start(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run(scheduler, model, z, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for t in scheduler.timesteps:
        fed = scheduler.scale_model_input(z, t) if hasattr(scheduler, "scale_model_input") else z
        z = scheduler.step(model(fed, t), t, z, generator=generator).prev_sample
    return z


# --- the peers' samples ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_peers_samples_on_its_grids(name, grid):
    config, choice = CONFIGS[name], dict(GRIDS[grid])
    if config.get("use_dynamic_shifting"):
        choice["mu"] = 0.8
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 0.1)):
        peer = FlowMatchEulerDiscreteScheduler(**config)
        ours = VDMFlowScheduler.from_config(peer.config)
        peer.set_timesteps(**choice)
        ours.set_timesteps(**choice)
        torch.testing.assert_close(ours.sigmas, peer.sigmas, rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(ours.timesteps, peer.timesteps, rtol=2e-6, atol=1e-4)

        def model(z, t):
            return torch.tanh(1.3 * z.float() + 0.001 * float(t)).to(z.dtype)

        one, other = (run(s, model, start(2, 3, 4, 4, dtype=dtype)) for s in (peer, ours))
        assert other.dtype == one.dtype
        torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("cls", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
@pytest.mark.parametrize(
    "config",
    [{}, {"sigma_schedule": "exponential"}, {"prediction_type": "v_prediction", "sigma_data": 1.0}, {"final_sigmas_type": "sigma_min"}],
    ids=["defaults", "exponential", "v", "sigma_min"],
)  # fmt: skip
def test_the_peers_samples_in_sigma_space(cls, config):
    for steps in (7, 20):
        peer = cls(**config)
        ours = VDMSigmaScheduler.from_config(peer.config)
        peer.set_timesteps(steps)
        ours.set_timesteps(steps)
        assert ours.init_noise_sigma == peer.init_noise_sigma
        torch.testing.assert_close(ours.sigmas, peer.sigmas, rtol=3e-5, atol=0)  # the solver's are float32's
        z = start(2, 3, 4, 4, dtype=torch.float32) * peer.init_noise_sigma

        def model(z, t):
            return torch.tanh(1.3 * z + 0.1 * t)

        torch.testing.assert_close(run(ours, model, z), run(peer, model, z), rtol=1e-4, atol=2e-6)


def test_noise_of_karras_is_the_peers():
    peer = EDMEulerScheduler()
    ours = VDMSigmaScheduler.from_config(peer.config)
    out = []
    for s in (peer, ours):
        s.set_timesteps(6)
        z, generator = start(2, 3, dtype=torch.float32) * 80, torch.Generator().manual_seed(1)
        for t in s.timesteps:
            y = torch.tanh(s.scale_model_input(z, t))
            z = s.step(y, t, z, s_churn=3.0, s_noise=1.003, generator=generator).prev_sample
        out.append(z)
    torch.testing.assert_close(out[1], out[0], rtol=1e-5, atol=1e-5)


def test_sigmas_handed_to_edm_are_sigmas():
    """The peer takes them for places between 0 and 1 on its own schedule."""
    wanted = torch.tensor([40.0, 5.0, 0.5])
    ours, peer = VDMSigmaScheduler(), EDMEulerScheduler()
    ours.set_timesteps(sigmas=wanted)
    peer.set_timesteps(sigmas=wanted)
    assert torch.equal(ours.sigmas[:-1], wanted)
    assert not torch.allclose(peer.sigmas[:-1], wanted)


def test_timesteps_of_tokens():
    """Each token goes to the next smaller sigma; clean tokens stay. Pipelines pass the negative prediction."""
    peer, ours = FlowMatchEulerDiscreteScheduler(), VDMFlowScheduler()
    timesteps = torch.tensor([[1000.0, 600.0, 0.0], [200.0, 800.0, 1000.0]])
    z, y = start(2, 3, 5, dtype=torch.float32), start(2, 3, 5, seed=1, dtype=torch.float32)
    for s in (peer, ours):
        s.set_timesteps(5)
    one = peer.step(y, peer.timesteps[0], z, per_token_timesteps=timesteps).prev_sample
    other = ours.step(y, ours.timesteps[0], z, per_token_timesteps=timesteps).prev_sample
    torch.testing.assert_close(other, one)
    ancestral = VDMFlowScheduler(stochasticity=1.0)
    ancestral.set_timesteps(5)
    drawn = ancestral.step(y, ancestral.timesteps[0], z, per_token_timesteps=timesteps, generator=torch.Generator())
    assert bool(drawn.prev_sample.isfinite().all()) and torch.equal(drawn.prev_sample[0, 2], z[0, 2])
    # the token at sigma 0.6 goes to 0.4002: mean and noise of the exact posterior
    sigma, below = 0.6, float(ours.sigmas[ours.sigmas < 0.6 - 1e-6].max())
    x = z[0, 1] + sigma * y[0, 1]
    mean, variance = ours.posterior_mean_variance(z[0, 1][None], x[None], 600.0, 1000 * below)
    noise = torch.randn(2, 3, 5, generator=torch.Generator())[0, 1]
    torch.testing.assert_close(
        drawn.prev_sample[0, 1], (mean[0] + variance.sqrt() * noise).float(), rtol=1e-5, atol=1e-5
    )


def test_places_of_a_run():
    peer, ours = FlowMatchEulerDiscreteScheduler(shift=3.0), VDMFlowScheduler(shift=3.0)
    torch.testing.assert_close(ours.sigmas, peer.sigmas)  # of the training chain, which recipes of training read
    torch.testing.assert_close(ours.timesteps, peer.timesteps)
    x, noise, t = (
        start(4, 3, dtype=torch.float32),
        start(4, 3, seed=1, dtype=torch.float32),
        peer.timesteps[[3, 500, 999, 0]],
    )
    torch.testing.assert_close(ours.scale_noise(x, t, noise), peer.scale_noise(x, t, noise))
    for s in (peer, ours):
        s.set_timesteps(4)
        s.set_begin_index(2)
        assert s.index_for_timestep(s.timesteps[1]) == 1
    t = peer.timesteps[2:3].expand(4)
    torch.testing.assert_close(ours.scale_noise(x, t, noise), peer.scale_noise(x, t, noise))
    outs = [s.step(noise, s.timesteps[2], x) for s in (peer, ours)]
    torch.testing.assert_close(outs[1].prev_sample, outs[0].prev_sample)
    assert (ours.step_index, ours.begin_index) == (peer.step_index, peer.begin_index) == (3, 2)
    ours.step(noise, ours.timesteps[3], x)
    with pytest.raises(ValueError, match="all 4 steps are taken"):
        ours.step(noise, ours.timesteps[3], x)
    ours.set_shift(1.0)
    assert ours.shift == 1.0
    back = FlowMatchEulerDiscreteScheduler.from_config(VDMFlowScheduler(shift=2.5, multistep_order=2).config)
    assert back.config.shift == 2.5


# --- truth -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stochasticity", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("path", ["flow", "flow, inverted", "sigma"])
def test_every_step_draws_from_the_marginal(path, stochasticity):
    """Where x_hat is x, z_s given x has mean alpha_s x and variance sigma_s^2, whatever the stochasticity: to
    1e-12.
    """
    x, eps = start(3, 2, 4, 4), start(3, 2, 4, 4, seed=1)
    if path == "sigma":
        s = VDMSigmaScheduler(stochasticity=stochasticity)
    else:
        s = VDMFlowScheduler(shift=2.0, stochasticity=stochasticity, invert_sigmas="inverted" in path)
    s.set_timesteps(6)
    noisy = s.sigmas.double() if path != "flow, inverted" else 1 - s.sigmas.double()
    for i, t in enumerate(s.timesteps):
        sigma, below = noisy[i], noisy[i + 1]
        alpha, alpha_below = (1 - sigma, 1 - below) if "flow" in path else (1.0, 1.0)
        z = alpha * x + sigma * eps
        y = eps - x
        if path == "sigma":
            skip, out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / (sigma**2 + 0.25).sqrt()
            y = (x - skip * z) / out
        elif "inverted" in path:
            y = -y
        s.set_begin_index(i)
        got = s.step(y, t, z, generator=torch.Generator().manual_seed(i)).prev_sample
        drawn = torch.randn(z.shape, generator=torch.Generator().manual_seed(i), dtype=z.dtype)
        ratio = (
            (alpha / sigma) / (alpha_below / below) if below > 0 else 0.0
        )  # of the two signal-to-noise ratios' roots
        deviation = stochasticity * below * math.sqrt(1 - ratio**2)
        exact = alpha_below * x + (below**2 - deviation**2).sqrt() * eps + deviation * drawn
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11)
        if stochasticity == 1 and below > 0:
            target = s.timesteps[i + 1]
            if path != "sigma":
                mean, variance = s.posterior_mean_variance(z, x, t, target)
                torch.testing.assert_close(got, mean + variance.sqrt() * drawn, rtol=1e-5, atol=1e-5)


def gaussian_flow(variance):
    """The network of data N(0, variance): E[eps - x | z], and the solution of its ordinary differential equation, z
    sqrt(variance).
    """

    def model(z, t):
        s = float(t) / 1000
        total = (1 - s) ** 2 * variance + s**2
        return z * (s - (1 - s) * variance) / total

    return model


@pytest.mark.parametrize(("order", "low", "high"), [(1, 1.8, 2.2), (2, 3.4, 4.6)])
def test_the_error_falls_with_the_order(order, low, high):
    z, errors = start(1000), []
    for steps in (40, 80, 160):
        s = VDMFlowScheduler(multistep_order=order)
        s.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
        errors.append(float((run(s, gaussian_flow(0.25), z) - 0.5 * z).abs().mean()))
    for one, other in itertools.pairwise(errors):
        assert low < one / other < high, errors


def mixture():
    generator = torch.Generator().manual_seed(0)
    means = 0.6 * torch.randn(4, 1, 2, 3, generator=generator, dtype=torch.float64)
    return GaussianMixture(means, torch.tensor([0.02, 0.05, 0.01, 0.03]).double(), torch.full((4,), 0.25).double())


def flow_network(data, num_timesteps=1000):
    """E[eps - x | z] of a mixture, a network of flow matching."""

    def model(z, t):
        s = (torch.as_tensor(t, dtype=torch.float64) / num_timesteps).expand(len(z))
        log_snr = 2 * (torch.log1p(-s) - s.log())
        x_hat = data.denoise(z.double(), log_snr, "flow")
        sigma = s.reshape(-1, *[1] * (z.ndim - 1))
        return ((z.double() - x_hat) / sigma).to(z.dtype)

    return model


def sliced_wasserstein(one, other):
    generator = torch.Generator().manual_seed(9)
    directions = torch.randn(one[0].numel(), 64, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    a, b = ((v.flatten(1).double() @ directions).sort(dim=0).values for v in (one, other))
    return float((a - b).abs().mean())


def test_second_order_in_ten_steps_is_nearer_to_the_data_than_eulers_25():
    data, generator = mixture(), torch.Generator().manual_seed(1)
    truth, model, z = data.sample(8000, generator), flow_network(data), start(8000, 1, 2, 3, seed=2)
    euler, second = FlowMatchEulerDiscreteScheduler(), VDMFlowScheduler(multistep_order=2)
    distance = {}
    for steps in (5, 10, 25):
        euler.set_timesteps(steps)
        second.set_timesteps(steps)
        distance[steps] = [sliced_wasserstein(run(s, model, z), truth) for s in (euler, second)]
    assert all(second < euler for euler, second in distance.values()), distance
    assert distance[10][1] < distance[25][0], distance


# --- one bound on every path -----------------------------------------------------------------------------------------


def same_network_on_every_path(network):
    """(z_vp, log SNR) -> v of the variance-preserving path, as networks of the three kinds with their schedulers."""
    flow, sigma = VDMFlowScheduler(shift=2.0), VDMSigmaScheduler(sigma_min=0.002, sigma_max=80.0)

    def of_vp(scheduler):
        return lambda z, t: network(z.double(), scheduler.log_snr(t.double())).to(z.dtype)

    def of_flow(z, t):
        log_snr = 2 * (torch.log1p(-t.double() / 1000) - torch.log(t.double() / 1000))
        a, s = (v.reshape(-1, 1, 1, 1) for v in alpha_sigma(log_snr))
        z_vp = z.double() * (a + s)
        v = network(z_vp, log_snr)
        x, eps = a * z_vp - s * v, s * z_vp + a * v
        return (eps - x).to(z.dtype)

    def of_sigma(z, t):
        log_snr = -8 * t.double()
        a, s = (v.reshape(-1, 1, 1, 1) for v in alpha_sigma(log_snr))
        level = s / a
        z_edm = z.double() * (level**2 + 0.25).sqrt()
        z_vp = a * z_edm
        x = a * z_vp - s * network(z_vp, log_snr)
        skip, out = 0.25 / (level**2 + 0.25), 0.5 * level / (level**2 + 0.25).sqrt()
        return ((x - skip * z_edm) / out).to(z.dtype)

    return flow, of_flow, sigma, of_sigma, of_vp


@pytest.mark.parametrize("method", ["continuous", "discrete", "ode"])
@pytest.mark.parametrize("kind", ["flow", "sigma"])
def test_a_network_and_its_rewriting_have_one_bound(kind, method):
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 16).double()

    def network(z, log_snr):
        v = torch.tanh(layer(z.flatten(1)) + 0.1 * log_snr.reshape(-1, 1))
        return v.reshape(z.shape)

    flow, of_flow, sigma, of_sigma, of_vp = same_network_on_every_path(network)
    scheduler, model = (flow, of_flow) if kind == "flow" else (sigma, of_sigma)
    high, low = scheduler.noise_schedule.log_snr_max, scheduler.noise_schedule.log_snr_min
    vp = VDMScheduler(
        beta_schedule="log_snr_linear", log_snr_max=high, log_snr_min=low, prediction_type="v_prediction"
    )
    images = torch.randint(0, 256, (5, 1, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    options = {"discrete": {"num_steps": 20, "grid": "log_snr"}}.get(method, {})
    reports = []
    for net, s in ((model, scheduler), (of_vp(vp), vp)):
        generator = torch.Generator().manual_seed(3)
        reports.append(
            evaluate_likelihood(
                net,
                images,
                scheduler=s,
                method=method,
                generator=generator,
                num_samples=8,
                progress_bar=False,
                **options,
            )
        )
    one, other = reports
    torch.testing.assert_close(one.nats, other.nats, rtol=2e-6, atol=1e-5)
    for term in ("prior", "diffusion", "reconstruction"):
        if getattr(one, term) is not None:
            torch.testing.assert_close(getattr(one, term), getattr(other, term), rtol=2e-6, atol=1e-5)
    assert one.standard_error == pytest.approx(other.standard_error, rel=1e-4)


@pytest.mark.parametrize("objective", ["elbo", "simple", "min_snr", "sigmoid"])
def test_training_losses_are_one_on_every_path(objective):
    """A flow's loss is `diffusion_loss` on its path; EDM's network is first made one of v, as the timeline says."""
    x, noise, y = start(6, 1, 4, 4), start(6, 1, 4, 4, seed=1), start(6, 1, 4, 4, seed=2)
    log_snr = torch.linspace(-6, 8, 6, dtype=torch.float64)
    options = {"objective": objective, "elbo_weight": torch.full((6,), 3.0, dtype=torch.float64)}
    alpha, sigma = (v.reshape(-1, 1, 1, 1) for v in alpha_sigma(log_snr))
    z = alpha * x + sigma * noise
    on_flow, on_vp = (
        diffusion_loss(y, x, noise, log_snr, prediction_type="flow_prediction", path=path, **options)
        for path in ("flow", "vp")
    )
    torch.testing.assert_close(on_flow, on_vp, rtol=1e-9, atol=0)
    timeline = SigmaTimeline()
    kind, from_z, from_y = timeline.on_vp(log_snr, "epsilon")
    v = from_z.reshape(-1, 1, 1, 1) * z + from_y.reshape(-1, 1, 1, 1) * y
    skip, out = (c.reshape(-1, 1, 1, 1) for c in timeline.denoising(log_snr, "epsilon"))
    x_hat = skip * z / alpha + out * y
    ours = diffusion_loss(v, x, noise, log_snr, prediction_type=kind, **options)
    torch.testing.assert_close(
        ours, diffusion_loss(x_hat, x, noise, log_snr, prediction_type="sample", **options), rtol=1e-9, atol=0
    )


STOCK = {
    "Euler": FlowMatchEulerDiscreteScheduler(shift=2.0),
    "Heun": FlowMatchHeunDiscreteScheduler(shift=2.0),
    "DPM-Solver": DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=2.0, prediction_type="flow_prediction"),
    "UniPC": UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=2.0, prediction_type="flow_prediction"),
}


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_flow_scheduler_gives_the_bound(name):
    data = mixture()
    x, model = data.sample(4, torch.Generator().manual_seed(0)).float(), flow_network(data)
    kwargs = {"num_levels": None, "num_samples": 8, "progress_bar": False}
    stock, ours = (
        evaluate_likelihood(model, x, scheduler=s, generator=torch.Generator().manual_seed(1), **kwargs)
        for s in (STOCK[name], VDMFlowScheduler(shift=2.0))
    )
    assert stock.nats_per_dim == ours.nats_per_dim


def test_bound_and_ode_of_a_mixture_are_the_truth():
    data = mixture()
    x, model = data.sample(24, torch.Generator().manual_seed(0)).float(), flow_network(data)
    exact = float(data.nats(x).mean()) / 6
    kwargs = {"scheduler": FlowMatchEulerDiscreteScheduler(), "num_levels": None, "progress_bar": False}
    bound = evaluate_likelihood(model, x, num_samples=200, generator=torch.Generator().manual_seed(1), **kwargs)
    ode = evaluate_likelihood(
        model, x, method="ode", divergence="exact", generator=torch.Generator().manual_seed(2), **kwargs
    )
    error = bound.standard_error * math.log(2)
    assert (
        exact - 4 * error < bound.nats_per_dim < exact + 4 * error + 0.02
    )  # as a density the exact denoiser's bound is nearly tight
    assert ode.nats_per_dim == pytest.approx(exact, abs=4 * ode.standard_error * math.log(2) + 0.02)


def test_the_optimal_variance_of_a_flow_travels_and_is_used():
    data = mixture()
    x, model = data.sample(64, torch.Generator().manual_seed(0)).float(), flow_network(data)
    kwargs = {"num_levels": None, "progress_bar": False}
    flow = VDMFlowScheduler()
    table = estimate_optimal_variance(
        model, x, scheduler=flow, num_samples=256, generator=torch.Generator().manual_seed(1), **kwargs
    )
    best = VDMFlowScheduler.from_config(
        flow.config, variance_type="optimal", optimal_variance=table, stochasticity=1.0, step_grid="optimal"
    )
    kwargs |= {"method": "discrete", "num_steps": 10, "num_samples": 200}
    plain, optimal = (
        evaluate_likelihood(model, x, scheduler=s, generator=torch.Generator().manual_seed(2), **kwargs)
        for s in (flow, best)
    )
    assert optimal.nats_per_dim < plain.nats_per_dim - 5 * (optimal.standard_error + plain.standard_error)
    truth, z = data.sample(4000, torch.Generator().manual_seed(3)), start(4000, 1, 2, 3, seed=4)
    ancestral = VDMFlowScheduler(stochasticity=1.0)
    for s in (ancestral, best):
        s.set_timesteps(10)
    assert float(best.timesteps[0]) == 1000.0
    assert sliced_wasserstein(run(best, model, z), truth) < sliced_wasserstein(run(ancestral, model, z), truth)


# --- the pieces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule", [FlowSchedule(shift=3.0), FlowSchedule(9.0, -11.0), KarrasSchedule(), KarrasSchedule(rho=3.0)], ids=str
)
def test_schedules_invert_and_their_derivatives_are_right(schedule):
    t = torch.linspace(0, 1, 41, dtype=torch.float64)
    log_snr = schedule.log_snr(t)
    assert bool((log_snr.diff() < 0).all())
    assert (float(log_snr[0]), float(log_snr[-1])) == (schedule.log_snr_max, schedule.log_snr_min)
    torch.testing.assert_close(schedule.inverse(log_snr), t, rtol=1e-12, atol=1e-13)
    inner = t[1:-1].clone().requires_grad_()
    (slope,) = torch.autograd.grad(schedule.log_snr(inner).sum(), inner)
    torch.testing.assert_close(schedule.derivative(t[1:-1]), slope, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "timeline", [FlowTimeline(1000, 3.0), FlowTimeline(1000, inverted=True), SigmaTimeline()], ids=str
)
def test_timelines_go_there_and_back(timeline):
    log_snr = torch.linspace(-8, 12, 33, dtype=torch.float64)
    torch.testing.assert_close(timeline.log_snr(timeline.timestep(log_snr)), log_snr, rtol=1e-12, atol=1e-11)
    assert float(timeline.log_snr(timeline.terminal_timestep)) == math.inf
    x, eps = start(33), start(33, seed=1)
    alpha, sigma = alpha_sigma(log_snr, timeline.path)
    vp = alpha_sigma(log_snr)
    torch.testing.assert_close(timeline.input_scale(log_snr) * (vp[0] * x + vp[1] * eps) / getattr(timeline, "network_scale", torch.ones_like)(log_snr), alpha * x + sigma * eps)  # fmt: skip


def test_a_shift_moves_the_schedule_along_the_log_snr_axis():
    plain, moved = FlowSchedule(8.0, -8.0), FlowSchedule(8.0 - 2 * math.log(3), -8.0 - 2 * math.log(3), shift=3.0)
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(moved.log_snr(t), plain.log_snr(t) - 2 * math.log(3), rtol=1e-12, atol=1e-12)


# --- bad input -------------------------------------------------------------------------------------------------------


REFUSED = {
    "a flow config to VDMScheduler": (lambda: VDMScheduler.from_config(FlowMatchEulerDiscreteScheduler().config), "VDMFlowScheduler.from_config"),
    "a DDPM config to VDMFlowScheduler": (lambda: VDMFlowScheduler.from_config(DDPMScheduler().config), "VDMScheduler.from_config"),
    "an EDM config to VDMScheduler": (lambda: VDMScheduler.from_config(EDMDPMSolverMultistepScheduler().config), "VDMSigmaScheduler.from_config"),
    "a flow config to VDMSigmaScheduler": (lambda: VDMSigmaScheduler.from_config(FlowMatchEulerDiscreteScheduler().config), "VDMFlowScheduler.from_config"),
    "mu missing": (lambda: VDMFlowScheduler(use_dynamic_shifting=True).set_timesteps(5), "`mu` must be passed"),
    "sigmas that ascend": (lambda: VDMFlowScheduler().set_timesteps(sigmas=[0.1, 0.9]), "must descend"),
    "sigmas above 1": (lambda: VDMFlowScheduler().set_timesteps(sigmas=[14.6, 0.9]), r"in \(0, 1\]"),
    "a sigma of 0": (lambda: VDMFlowScheduler().set_timesteps(sigmas=[1.0, 0.0]), "leave it out"),
    "two lengths": (lambda: VDMFlowScheduler().set_timesteps(3, sigmas=[1.0, 0.5]), "of one length"),
    "no steps": (lambda: VDMFlowScheduler().set_timesteps(), "say how many steps"),
    "two spacings": (lambda: VDMFlowScheduler(use_karras_sigmas=True, use_beta_sigmas=True), "only one of"),
    "a shift of 0": (lambda: VDMFlowScheduler(shift=0.0), "`shift` must be a positive"),
    "negative stochasticity": (lambda: VDMFlowScheduler(stochasticity=-1.0), "`stochasticity` must"),
    "an unknown grid": (lambda: VDMFlowScheduler(step_grid="best"), "`step_grid` must be one of"),
    "optimal without a table": (lambda: VDMFlowScheduler(step_grid="optimal"), "estimate_optimal_variance"),
    "an index for a timestep": (lambda: VDMFlowScheduler().step(torch.ones(1, 2), 3, torch.ones(1, 2)), "not its index"),
    "shapes": (lambda: VDMFlowScheduler().step(torch.ones(1, 2), 1000.0, torch.ones(1, 3)), "must have the shape of"),
    "no noise": (lambda: VDMFlowScheduler().scale_noise(torch.ones(1, 2), torch.tensor([1000.0])), "`noise` must be passed"),
    "sigmas of EDM that ascend": (lambda: VDMSigmaScheduler().set_timesteps(sigmas=[1.0, 2.0]), "descend"),
    "an unknown schedule": (lambda: VDMSigmaScheduler(sigma_schedule="cosine"), "`sigma_schedule` must be one of"),
    "a range upside down": (lambda: VDMSigmaScheduler(sigma_min=3.0, sigma_max=1.0), "in this order"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused_in_one_sentence(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert len(str(error.value)) < 400
