"""The optimal reverse variance of every radial band of frequencies: exact maths, the scheduler's noise, the bound,
and its travels.
"""

import itertools
import json
import math

import pytest
import torch
from exact_models import GaussianMixture

from vdm_diffusers import VDMPipeline, VDMScheduler, VDMUNet2DModel, estimate_optimal_variance, evaluate_likelihood
from vdm_diffusers.decoders import decode_pixels
from vdm_diffusers.evaluation import chain_log_snrs
from vdm_diffusers.frequency import RadialBands
from vdm_diffusers.gaussian import posterior_coefficients
from vdm_diffusers.likelihood import DenoisingModel, DiscreteTerm
from vdm_diffusers.reverse_variance import OptimalVariance, continuous_nats, expected_step_nats, optimal_grid

SHAPE = (2, 3, 5)
LOG_SNR = {"beta_schedule": "log_snr_linear", "clip_sample": False}


def power(shape=SHAPE):
    """A power spectrum (C, bands) that falls with the band."""
    bands = RadialBands.of(*shape[1:])
    band = torch.arange(len(bands.counts), dtype=torch.float64)
    return torch.stack([(c + 1) * 0.5 * 0.6**band for c in range(shape[0])])


def gaussian_table(shape=SHAPE, knots=64):
    """Of N(0, T^T diag(power) T): E (x - E[x|z])^2 of each frequency is 1 / (1/power + SNR)."""
    log_snr = torch.linspace(-5.0, 13.3, knots, dtype=torch.float64)
    return OptimalVariance(log_snr, 1 / (1 / power(shape) + log_snr.exp()[:, None, None]), shape)


def matrix(shape=SHAPE):
    """(D, D) the cosine transform of whole images, built one unit image at a time."""
    unit = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    return RadialBands.of(*shape[1:]).transform(unit).flatten(1).T


def covariance(values, shape=SHAPE):
    """(D, D) of pixels, for values (C, bands) of the frequencies."""
    return matrix(shape).T @ torch.diag(RadialBands.of(*shape[1:]).spread(values).flatten()) @ matrix(shape)


def scheduler(table, **config):
    return VDMScheduler(**LOG_SNR, variance_type="optimal", optimal_variance=table.to_config(), **config)


def test_for_a_gaussian_every_grid_is_exact():
    """Its true reverse transitions have just these variances, so that no step costs more than information."""
    optimal = gaussian_table(knots=5)
    grid = optimal.log_snr.flip(0)
    weight = RadialBands.of(3, 5).counts
    exact = (0.5 * (torch.log1p(power() * math.exp(13.3)) - torch.log1p(power() * math.exp(-5))) @ weight).sum() / 30
    assert float(optimal.step_nats(grid[:-1], grid[1:]).sum()) == pytest.approx(float(exact), rel=1e-12)
    assert continuous_nats(gaussian_table(knots=2000), 13.3, -5.0) == pytest.approx(float(exact), rel=1e-6)
    overall = expected_step_nats(grid[:-1], grid[1:], optimal.overall.at(grid[1:])).sum()
    assert float(overall) > 1.01 * float(exact)
    posterior = optimal.step_nats(grid[:-1], grid[1:], "posterior")
    torch.testing.assert_close(posterior, optimal.overall.step_nats(grid[:-1], grid[1:], "posterior"))


def test_dynamic_programming_weighs_every_frequency():
    generator = torch.Generator().manual_seed(0)
    knots = torch.linspace(-5.0, 13.3, 9, dtype=torch.float64)
    optimal = OptimalVariance(knots, torch.rand(9, 2, 15, generator=generator) * (-knots).exp()[:, None, None], SHAPE)
    candidates = torch.linspace(13.3, -5.0, 9, dtype=torch.float64)

    def cost(grid):
        return float(optimal.step_nats(grid[:-1], grid[1:]).sum())

    every = [candidates[[0, i, j, 8]] for i in range(1, 8) for j in range(i + 1, 8)]
    assert torch.equal(optimal_grid(optimal, 3, candidates), min(every, key=cost))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_steps_kl_is_that_of_two_gaussians(prediction_type):
    """Against the KL of multivariate normals of pixels, whose covariance matrices are written out."""
    optimal, generator = gaussian_table(), torch.Generator().manual_seed(0)
    term = DiscreteTerm(torch.tensor([13.3, 4.0, -1.0, -5.0], dtype=torch.float64), "optimal", optimal)
    x, noise, value = (torch.randn(3, *SHAPE, generator=generator, dtype=torch.float64) for _ in range(3))
    site = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    s, t = term.grid[:-1], term.grid[1:]
    alpha, sigma = (t.sigmoid().sqrt().reshape(3, 1, 1, 1), (-t).sigmoid().sqrt().reshape(3, 1, 1, 1))
    z = alpha * x + sigma * noise
    x_hat = (z - sigma * value) / alpha if prediction_type == "epsilon" else alpha * z - sigma * value
    model = DenoisingModel(lambda *_: value, prediction_type, num_levels=None)
    got = term.nats(site, *model.error(value, x, noise, z, t), None)
    for i in range(3):
        c = posterior_coefficients(t[i], s[i])
        q, p = (
            torch.distributions.MultivariateNormal((c.z * z[i] + c.x * mean[i]).flatten(), spread)
            for mean, spread in [
                (x, float(c.variance) * torch.eye(30, dtype=torch.float64)),
                (x_hat, covariance(optimal.variance(s[i], t[i]))),
            ]
        )
        assert float(got[i]) == pytest.approx(float(torch.distributions.kl_divergence(q, p)), rel=1e-8)
    # what the estimator takes for known is right in the mean: with errors of just the expected size nothing is left
    expected = term.constant(site, 30) + term.scale(site) * t.exp() * 30 * optimal.mean(optimal.at(t))
    steps = 30 * optimal.step_nats(s, t)
    torch.testing.assert_close(expected, steps, rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match=r"images of shape \(2, 3, 5\), got \(2, 6, 5\)"):
        term.nats(site, torch.zeros(3, 2, 6, 5), torch.ones(3), None)


GRID = [-5.0, -1.0, 2.5, 9.0]


@pytest.mark.parametrize(
    "config", [{}, {"stochasticity": 0.7}, {"final_step": "mean"}, {"multistep_order": 2}], ids=str
)
def test_the_samplers_noise_has_the_covariance(config):
    optimal = gaussian_table()
    s = scheduler(optimal, **config)
    plain = VDMScheduler(**LOG_SNR, **config)
    for each in (s, plain):
        each.set_timesteps(log_snrs=GRID)
    model_output, z = (torch.randn(4, *SHAPE, generator=torch.manual_seed(i), dtype=torch.float64) for i in (0, 1))
    for i, t in enumerate(s.timesteps):
        white = torch.randn(4, *SHAPE, generator=torch.manual_seed(9), dtype=torch.float64)
        got = s.step(model_output, t, z, generator=torch.manual_seed(9)).prev_sample
        fixed = plain.step(model_output, t, z, generator=torch.manual_seed(9)).prev_sample
        last_to_x_hat = i == 3 and config.get("final_step") == "mean"
        deviation = 0.0 if last_to_x_hat else config.get("stochasticity", 1.0) * float(plain._get_variance(t)) ** 0.5
        mean = fixed - white * deviation
        log_snr_s = s.log_snr(s.timesteps[i + 1]) if i < 3 else torch.tensor(13.3, dtype=torch.float64)
        if i == 3 and config.get("final_step") == "mean":
            assert torch.equal(got, mean)
            continue
        variance = optimal.variance(log_snr_s, s.log_snr(t))
        if "stochasticity" not in config:
            root = covariance(variance.sqrt())  # the symmetric root of the covariance
            expected = mean + (white.flatten(1) @ root).reshape(white.shape)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
        assert float(s._get_variance(t)) == pytest.approx(float(optimal.mean(variance)), rel=1e-9)
        if s.config.multistep_order == 1:  # one timestep for each sample, the same noise
            several = s.step(model_output, t.expand(4), z, generator=torch.manual_seed(9)).prev_sample
            torch.testing.assert_close(several, got, rtol=0, atol=1e-9)
        else:  # the next step's predecessor is forgotten
            s.set_timesteps(log_snrs=GRID), plain.set_timesteps(log_snrs=GRID)


def test_bands_of_one_value_are_the_scalar_variance_and_the_dtype_stays():
    scalar = OptimalVariance(torch.tensor([-5.0, 3.0, 13.3]), torch.tensor([0.3, 0.05, 1e-6]))
    by_band = OptimalVariance(scalar.log_snr, scalar.mse[:, None, None].expand(3, 2, 15).clone(), SHAPE)
    a, b = scheduler(scalar), scheduler(by_band)
    assert torch.equal(chain_log_snrs(a, 9), chain_log_snrs(b, 9)) and len(chain_log_snrs(a, 9)) == 10
    for s in (a, b):
        s.set_timesteps(9)
    assert torch.equal(a.timesteps, b.timesteps)
    for dtype, tolerance in [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]:
        x, z = (torch.randn(2, *SHAPE, generator=torch.manual_seed(i)).to(dtype) for i in (0, 1))
        out = [s.step(x, s.timesteps[4], z, generator=torch.manual_seed(5)).prev_sample for s in (a, b)]
        assert out[1].dtype == dtype
        torch.testing.assert_close(out[1], out[0], rtol=tolerance, atol=tolerance)
    b, a = scheduler(by_band), scheduler(scalar)  # no grid chosen: fractional timesteps step down by one
    out = [s.step(x, 400.5, z, generator=torch.manual_seed(5)).prev_sample for s in (a, b)]
    torch.testing.assert_close(out[1], out[0], rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match=r"images of shape \(2, 3, 5\), got \(2, 5, 3\)"):
        b.step(x.mT.contiguous(), b.timesteps[4], z.mT.contiguous())


def test_what_a_table_may_not_be():
    config = gaussian_table().to_config()
    for change, message in [
        ({"shape": [2, 3]}, "that of an image"),
        ({"shape": [2, 3, 6]}, "2 channels x"),
        ({"shape": [3, 3, 5]}, "3 channels x 15 bands"),
        ({"mse": config["mse"][:-1]}, "one length"),
        ({"mse": [[[1.0], [1.0, 2.0]]]}, "two lists"),
        ({"mse": None}, "two lists"),
        ({"log_snr": [math.nan] * 64}, "finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            VDMScheduler(**LOG_SNR, variance_type="optimal", optimal_variance={**config, **change})
    with pytest.raises(ValueError, match="at most 64 log SNRs, got 65"):
        scheduler(gaussian_table(knots=65))


def test_it_travels_with_the_checkpoint(tmp_path):
    shape = (1, 8, 8)
    unet = VDMUNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        hidden_channels=8,
        layers_per_block=1,
        norm_num_groups=4,
        dropout=0.0,
    )
    pipe = VDMPipeline(
        unet=unet, scheduler=scheduler(gaussian_table(shape)), num_levels=256, pixel_encoding="bin_center"
    )
    pipe.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())["optimal_variance"]
    assert len(saved["mse"]) == 64 and len(saved["mse"][0][0]) == 32 and saved["shape"] == [1, 8, 8]
    again = VDMPipeline.from_pretrained(tmp_path)
    images = [
        p(batch_size=2, num_inference_steps=3, generator=torch.manual_seed(0), output_type="np").images
        for p in (pipe, again)
    ]
    assert (images[0] == images[1]).all()
    discrete = again.scheduler.as_discrete()
    assert discrete.config.optimal_variance["shape"] == [1, 8, 8]


def spectral(shape=(1, 8, 8)):
    """A mixture of two Gaussians diagonal in the cosine transform: samples, and the exact denoiser of pixels."""
    bands = RadialBands.of(*shape[1:])
    spread = (
        bands.spread(0.25 / (1 + torch.arange(len(bands.counts), dtype=torch.float64)) ** 1.5).expand(shape) + 1e-4
    )
    mean = 0.3 * torch.randn(2, *shape, generator=torch.manual_seed(3), dtype=torch.float64) * spread.sqrt()

    def sample(number, generator):
        k = torch.randint(2, (number,), generator=generator)
        return bands.inverse(
            mean[k] + spread.sqrt() * torch.randn(number, *shape, generator=generator, dtype=torch.float64)
        )

    def denoise(z, log_snr):
        alpha, sigma = (v.sigmoid().sqrt().reshape(-1, 1, 1, 1) for v in (log_snr.double(), -log_snr.double()))
        z, total = bands.transform(z.double()), alpha**2 * spread + sigma**2
        far = torch.stack([((z - alpha * m) ** 2 / total).flatten(1).sum(1) for m in mean], dim=1)
        weights = torch.softmax(-far / 2, dim=1)
        center = (weights[:, :, None, None, None] * mean).sum(1)
        return bands.inverse(center + alpha * spread / total * (z - alpha * center))

    return sample, denoise


def epsilon_model(denoise, log_snr_of):
    def model(z, t):
        log_snr = log_snr_of(t).expand(len(z))
        alpha, sigma = (v.sigmoid().sqrt().reshape(-1, 1, 1, 1) for v in (log_snr, -log_snr))
        return ((z - alpha * denoise(z, log_snr)) / sigma).to(z.dtype)

    return model


def test_measured_by_frequency_it_lowers_the_bound_of_few_steps():
    sample, denoise = spectral()
    generator = torch.Generator().manual_seed(0)
    s = VDMScheduler(**LOG_SNR)
    model = epsilon_model(denoise, s.log_snr)
    kwargs = {"num_levels": None, "progress_bar": False}
    train, x = sample(256, generator).float(), sample(24, generator).float()
    tables = [
        estimate_optimal_variance(
            model, train, scheduler=s, num_samples=32, per_frequency=f, generator=generator, **kwargs
        )
        for f in (False, True)
    ]
    assert tables[1]["shape"] == [1, 8, 8] and torch.tensor(tables[1]["mse"]).shape == (64, 1, 32)
    overall = OptimalVariance.from_config(tables[1]).overall
    at = torch.tensor([-3.0, 2.0, 8.0], dtype=torch.float64)
    torch.testing.assert_close(overall.at(at), OptimalVariance.from_config(tables[0]).at(at), rtol=0.2, atol=0)
    reports = []
    for table in (None, *tables):
        config = {} if table is None else {"variance_type": "optimal", "optimal_variance": table}
        chain = VDMScheduler.from_config(s.config, **config)
        run = {
            "scheduler": chain,
            "num_steps": 6,
            "grid": "log_snr",
            "generator": torch.Generator().manual_seed(1),
            **kwargs,
        }
        reports.append(evaluate_likelihood(model, x, method="discrete", num_samples=24, **run))
    assert [r.settings["reverse_variance"] for r in reports] == ["posterior", "optimal", "optimal_per_frequency"]
    for worse, better in itertools.pairwise(reports):
        assert better.bits_per_dim < worse.bits_per_dim - 5 * math.hypot(better.standard_error, worse.standard_error)
    # the subset of the steps, with control variates, and the K = 1 case of the sampled log ratios have the same
    # expectation
    run |= {"generator": torch.Generator().manual_seed(2)}
    part = evaluate_likelihood(model, x, method="discrete", num_samples=4, **run)
    one = evaluate_likelihood(model, x, method="importance_weighted", num_samples=2, **run)
    for other in (part, one):
        error = math.hypot(other.standard_error, reports[2].standard_error)
        assert abs(other.bits_per_dim - reports[2].bits_per_dim) < 5 * error
    with pytest.raises(ValueError, match="per_frequency=True"):
        evaluate_likelihood(model, x[:, :, :6, :6], method="discrete", num_samples=4, **run)
    with pytest.raises(ValueError, match=r"1..64 with per_frequency"):
        estimate_optimal_variance(model, x, scheduler=s, num_knots=65, per_frequency=True, **kwargs)


# --- Analytic-DPM: from the network alone ----------------------------------------------------------------------------


@pytest.mark.parametrize("per_frequency", [False, True])
def test_the_analytic_form_agrees_with_the_errors_of_an_exact_network(per_frequency):
    """For a Gaussian both have a closed form; z_t comes from data, and from the network's own samples."""
    shape, generator = (1, 4, 4), torch.Generator().manual_seed(0)
    data = GaussianMixture.gaussian(torch.zeros(shape), 0.2)
    s = VDMScheduler(**LOG_SNR)
    model = data.as_model(s.log_snr)
    x = data.sample(512, generator).float()
    kwargs = {"scheduler": s, "num_levels": None, "progress_bar": False, "num_knots": 8, "generator": generator}
    kwargs |= {"per_frequency": per_frequency}
    by_data = estimate_optimal_variance(model, x, form="analytic", num_samples=64, **kwargs)
    own = estimate_optimal_variance(
        model, None, sample_shape=shape, num_images=512, num_steps=500, num_samples=64, **kwargs
    )
    errors = estimate_optimal_variance(model, x, num_samples=64, **kwargs)
    log_snr = torch.tensor(errors["log_snr"], dtype=torch.float64)
    exact = 1 / (1 / 0.2 + log_snr.exp())
    # eps^2 - eps_hat^2 of one coordinate has variance 2 r (2 - r), r = 1 - E eps_hat^2; errors of x_hat vary less
    r = exact * log_snr.exp()
    deviation = (-log_snr).exp() * torch.sqrt(2 * r * (2 - r))
    counts = RadialBands.of(4, 4).counts if per_frequency else torch.tensor([16.0], dtype=torch.float64)
    error = deviation[:, None] / torch.sqrt(512 * 64 / 8 * counts)
    for table, bias in [(by_data, 0.0), (errors, 0.0), (own, 0.02)]:  # 500 steps sample nearly right
        got = OptimalVariance.from_config(table).mse.reshape(8, -1)
        assert bool(((got - exact[:, None]).abs() < 6 * error + bias * exact[:, None]).all())


def test_the_analytic_form_is_worse_for_a_wrong_network():
    """x_hat off by 20%: the error form still gives the smallest step, the analytic one does not."""
    data, s = GaussianMixture.gaussian(torch.zeros(1, 4, 4), 0.2), VDMScheduler(**LOG_SNR)

    def model(z, t):
        log_snr = s.log_snr(t)
        alpha, sigma = (v.sigmoid().sqrt().reshape(-1, 1, 1, 1) for v in (log_snr, -log_snr))
        return ((z - alpha * 1.2 * data.denoise(z, log_snr)) / sigma).to(z.dtype)

    x = data.sample(256, torch.Generator().manual_seed(0)).float()
    kwargs = {"scheduler": s, "num_levels": None, "progress_bar": False, "num_samples": 32}
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    by_error, analytic = (
        estimate_optimal_variance(model, x, form=f, generator=g, **kwargs)
        for f, g in zip(("error", "analytic"), generators, strict=True)
    )
    run = {"num_levels": None, "progress_bar": False, "method": "discrete", "grid": "log_snr", "num_steps": 4}
    bounds = []
    for table in (by_error, analytic):
        chain = VDMScheduler.from_config(s.config, variance_type="optimal", optimal_variance=table)
        bounds.append(
            evaluate_likelihood(
                model, x, scheduler=chain, num_samples=16, generator=torch.Generator().manual_seed(2), **run
            )
        )
    assert bounds[0].bits_per_dim < bounds[1].bits_per_dim - 5 * math.hypot(*(b.standard_error for b in bounds))


def test_own_samples_of_integers_and_of_labels():
    points = torch.tensor([0.0, 255.0]).reshape(2, 1, 1, 1).expand(2, 1, 2, 2) / 127.5 - 1
    data = GaussianMixture.points(points.double())
    s = VDMScheduler(clip_sample=False)
    exact, seen = data.as_model(s.log_snr), []

    def model(z, t, class_labels):
        seen.extend(class_labels.tolist())
        return exact(z, t)

    kwargs = {"scheduler": s, "pixel_encoding": "endpoint", "progress_bar": False, "num_steps": 40}
    kwargs |= {"generator": torch.Generator().manual_seed(0), "model_kwargs": {"class_labels": torch.arange(8)}}
    table = estimate_optimal_variance(model, sample_shape=(1, 2, 2), num_images=8, num_samples=512, **kwargs)
    got = OptimalVariance.from_config(table)
    assert set(seen) == set(range(8)) and got.mse.max() <= 1
    assert float(got.at(torch.tensor(12.0))) < 1e-8  # two known images are told apart long before
    assert float(got.at(torch.tensor(-9.0))) == pytest.approx(1, abs=0.3)
    with pytest.raises(ValueError, match="sample_shape"):
        estimate_optimal_variance(exact, scheduler=s, progress_bar=False)
    with pytest.raises(ValueError, match="`form` must be"):
        estimate_optimal_variance(exact, scheduler=s, form="network", sample_shape=(1, 2, 2))
    assert decode_pixels(points[1], 256, "endpoint").unique().tolist() == [255]


# --- the grid that comes with it -------------------------------------------------------------------------------------


def test_the_right_grid_comes_by_default():
    table = gaussian_table((1, 4, 4), knots=16)
    linear = VDMScheduler(variance_type="optimal", optimal_variance=table.to_config())
    entries = linear.log_snr(torch.arange(1000))
    for steps in (1, 2, 128, 129, 1000):
        linear.set_timesteps(steps)
        chosen = linear.timesteps.flip(0)
        assert len(chosen) == steps and chosen[-1] == 999 and bool((chosen.diff() > 0).all())
        if steps > 1:
            assert chosen[0] == 0 and torch.equal(entries[chosen], chain_log_snrs(linear, steps))
    even = VDMScheduler.from_config(linear.config, step_grid="log_snr")
    even.set_timesteps(25)
    spacing = even.log_snr(even.timesteps).diff()
    assert float(spacing.max() / spacing.min()) < 1.2
    for config in ({"step_grid": "time"}, {"stochasticity": 0.0}, {"variance_type": "fixed_small"}):
        s, plain = VDMScheduler.from_config(linear.config, **config), VDMScheduler()
        s.set_timesteps(25), plain.set_timesteps(25)
        assert torch.equal(s.timesteps, plain.timesteps)
    optimal = VDMScheduler.from_config(linear.config, step_grid="optimal", variance_type="fixed_small")
    optimal.set_timesteps(25)
    posterior = optimal_grid(table, 24, entries, variance="posterior")
    assert torch.equal(optimal.log_snr(optimal.timesteps), posterior.flip(0))
    assert torch.equal(chain_log_snrs(optimal, 25), posterior)

    for name, final_step in [("log_snr_linear", "latent"), ("log_snr_cosine", "latent"), ("log_snr_cosine", "mean")]:
        s = VDMScheduler(
            beta_schedule=name, variance_type="optimal", optimal_variance=table.to_config(), final_step=final_step
        )
        for steps in (1, 2, 9, 200):
            s.set_timesteps(steps)
            log_snr = s.log_snr(s.timesteps)
            assert (
                len(log_snr) == steps and float(log_snr[0]) == pytest.approx(-5.0) and bool((log_snr.diff() > 0).all())
            )
            torch.testing.assert_close(chain_log_snrs(s, steps)[1:].flip(0), log_snr, rtol=0, atol=1e-5)
            if final_step == "mean" and steps > 1:  # x_hat is returned where next to no noise is left
                assert float(log_snr[-1]) == pytest.approx(13.3 - 18.3 / 1000, abs=1e-3)
        assert len(chain_log_snrs(s)) == 1001
        torch.testing.assert_close(chain_log_snrs(s).diff(), torch.full((1000,), -18.3 / 1000).double())
    zero = VDMScheduler(
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        variance_type="optimal",
        optimal_variance=table.to_config(),
    )
    for grid in (None, "log_snr"):
        zero = VDMScheduler.from_config(zero.config, step_grid=grid)
        zero.set_timesteps(10)
        assert zero.timesteps[0] == 999 and zero.timesteps[-1] == 0 and len(zero.timesteps) == 10
    with pytest.raises(ValueError, match="step_grid"):
        VDMScheduler(step_grid="even")
    with pytest.raises(ValueError, match="optimal_variance"):
        VDMScheduler(step_grid="optimal")
