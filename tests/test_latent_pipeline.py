"""A VAE with a diffusion prior: the joint bound against closed forms, its factors, training, sampling, saving."""

import math
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from vdm_diffusers import (
    LatentVDMPipeline,
    VariationalAutoencoder,
    VDMScheduler,
    VDMUNet2DModel,
    evaluate_latent_likelihood,
)
from vdm_diffusers.decoders import discretized_logistic_log_likelihood, encode_pixels
from vdm_diffusers.elbo_forms import Normal, standard_normal
from vdm_diffusers.gaussian import alpha_sigma


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scheduler(**config):
    return VDMScheduler(beta_schedule="log_snr_linear", **{"log_snr_max": 8.0, "log_snr_min": -7.0, **config})


def vae(**config):
    torch.manual_seed(1)
    model = VariationalAutoencoder(
        **{
            "sample_size": 8,
            "in_channels": 1,
            "latent_channels": 2,
            "block_out_channels": (8, 8),
            "num_levels": 17,
            **config,
        }
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def unet():
    torch.manual_seed(2)
    return VDMUNet2DModel(
        sample_size=4,
        in_channels=2,
        hidden_channels=8,
        layers_per_block=1,
        fourier_exponents=(),
        dropout=0.0,
        norm_num_groups=4,
    )


def images(count=6):
    return torch.randint(17, (count, 1, 8, 8), generator=generator())


class ExactPrior(VDMUNet2DModel):
    """The denoiser of y ~ N(0, 1): E[eps | y_t] = sigma y_t."""

    def __init__(self, schedule):
        super().__init__(sample_size=4, in_channels=2, hidden_channels=4, layers_per_block=1, norm_num_groups=1)
        self.schedule = schedule

    def forward(self, sample, timestep, **_):
        _, sigma = alpha_sigma(self.schedule.log_snr(timestep.double()))
        return type("Output", (), {"sample": (sigma.view(-1, 1, 1, 1) * sample.double()).to(sample.dtype)})


@pytest.mark.parametrize("factors", [(1.0, 3.0), (0.3, -9.0)])
def test_joint_bound_with_an_exact_prior_is_the_bound_of_the_vae_itself(factors):
    """A diffusion model that is exact for N(0, 1) costs what N(0, 1) costs: in scaled latents the KL is in closed
    form.
    """
    ends = scheduler(log_snr_max=11.0, log_snr_min=-11.0)
    pipe = LatentVDMPipeline(vae(scaling_factor=factors[0], shift_factor=factors[1]), ExactPrior(ends), ends)
    levels = images(1).expand(1000, -1, -1, -1)
    with torch.no_grad():
        bounds = [pipe.bound(levels, generator=generator(seed)) for seed in range(25)]
        distribution = pipe.vae.encode(encode_pixels(levels[:1], 17)).latent_dist
        mean = (distribution.mean - factors[1]) * factors[0]
        kl = Normal(mean, distribution.var * factors[0] ** 2).kl(standard_normal(mean))
    # times are stratified within a batch: the scatter of whole batches is the error
    rates = torch.stack([(bound.entropy + bound.latent.nats).mean() for bound in bounds])
    error = float(rates.std()) / math.sqrt(len(rates))
    gap = 32 * math.exp(-11.0)  # of the two ends, at most
    assert abs(float(rates.mean() - kl)) < 5 * error + gap
    assert error < 0.02 * float(kl)  # the comparison means something
    torch.testing.assert_close(bounds[0].nats, bounds[0].terms.nats, rtol=1e-5, atol=1e-3)


def test_the_image_term_is_the_vae_s_likelihood_of_unscaled_latents():
    pipe = LatentVDMPipeline(vae(scaling_factor=0.3, shift_factor=0.5), unet(), scheduler())
    levels = images()
    y = pipe.encode(levels, generator=generator(4))
    bound = pipe.bound(levels, generator=generator(4))
    torch.testing.assert_close(-bound.image, pipe.vae.log_likelihood(levels, y / 0.3 + 0.5))
    torch.testing.assert_close(
        pipe.encode(levels) / 0.3 + 0.5, pipe.vae.encode(encode_pixels(levels, 17)).latent_dist.mean
    )


def test_fitted_scale_gives_unit_latents_and_leaves_the_vae_s_own_meaning():
    pipe = LatentVDMPipeline(vae(), unet(), scheduler())
    levels = images(400)
    before = pipe.decode(pipe.encode(levels[:5]))
    pipe.fit_latent_scale(levels)
    assert pipe.scaling_factor != 1
    with torch.no_grad():
        y = pipe.encode(levels, generator=generator())
    assert abs(float(y.mean())) < 0.02
    assert float(y.var()) == pytest.approx(1, rel=0.03)
    torch.testing.assert_close(pipe.decode(pipe.encode(levels[:5])), before)
    pipe.fit_latent_scale(levels)  # a second time changes nothing
    with torch.no_grad():
        torch.testing.assert_close(pipe.encode(levels, generator=generator()), y, rtol=1e-4, atol=1e-4)


def test_end_to_end_gradients_reach_encoder_decoder_and_prior():
    pipe = LatentVDMPipeline(vae(), unet(), scheduler())
    pipe.unet.train()
    for _ in range(2):  # a new network passes no gradient through its last, zero layer: take one step first
        optimizer = torch.optim.SGD([*pipe.vae.parameters(), *pipe.unet.parameters()], lr=1e-4)
        optimizer.zero_grad()
        pipe.bound(images(), generator=generator()).nats.mean().backward()
        optimizer.step()
    for model in (pipe.vae.encoder, pipe.vae.decoder, pipe.unet):
        assert any(bool((p.grad != 0).any()) for p in model.parameters() if p.grad is not None)
    pipe.vae.requires_grad_(False)
    with torch.no_grad():
        y = pipe.encode(images())
    assert not y.requires_grad
    assert pipe.latent_bound(y, generator=generator()).nats.requires_grad


def test_training_the_prior_lowers_the_joint_bound():
    torch.manual_seed(0)
    pipe = LatentVDMPipeline(vae(), unet(), scheduler())
    levels = images(64)
    pipe.fit_latent_scale(levels)
    pipe.vae.requires_grad_(False)
    optimizer = torch.optim.AdamW(pipe.unet.parameters(), lr=3e-3)
    reports = []
    for steps in (0, 60):
        for step in range(steps):
            with torch.no_grad():
                y = pipe.encode(levels, generator=generator(step))
            loss = pipe.latent_bound(y, generator=generator(step)).nats.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        reports.append(evaluate_latent_likelihood(pipe.bound, levels, num_repeats=24))
    assert reports[0].bits_per_dim - reports[1].bits_per_dim > 5 * (
        reports[0].standard_error + reports[1].standard_error
    )
    assert reports[1].is_bound
    terms = reports[1].prior + reports[1].diffusion + reports[1].reconstruction
    torch.testing.assert_close(terms, reports[1].nats, rtol=1e-6, atol=1e-4)


def test_sampling_encoding_interpolation():
    pipe = LatentVDMPipeline(vae(), unet(), scheduler())
    pipe.set_progress_bar_config(disable=True)
    first, again = (pipe(3, 5, generator=generator(7), output_type="pt").images for _ in range(2))
    assert first.shape == (3, 1, 8, 8)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert 0 <= float(first.min()) <= float(first.max()) <= 1
    latents = pipe(3, 5, generator=generator(7), output_type="latent").images
    torch.testing.assert_close(pipe.decode(latents).float() / 16, first)
    assert len(pipe(2, 3, generator=generator()).images) == 2
    a, b = images(2).split(1)
    for noise_level in (0.0, 0.4):
        row = pipe.interpolate(a, b, 5, noise_level=noise_level, num_inference_steps=10, generator=generator())
        assert row.shape == (5, 1, 8, 8)
    row = pipe.interpolate(a, b, 5)
    torch.testing.assert_close(row[:1], pipe.decode(pipe.encode(a)))
    torch.testing.assert_close(row[-1:], pipe.decode(pipe.encode(b)))


def test_a_gaussian_prior_is_sampled_with_its_variance():
    # with the exact denoiser of N(0, 1) the sampled latents are N(0, 1): the last division by alpha_0 included
    ends = scheduler(log_snr_max=2.0, log_snr_min=-8.0, variance_type="fixed_small")
    pipe = LatentVDMPipeline(vae(), ExactPrior(ends), ends)
    pipe.set_progress_bar_config(disable=True)
    y = pipe(1500, 200, generator=generator(), output_type="latent").images
    alpha, _ = alpha_sigma(2.0)
    z_0 = y * float(alpha)
    # 200 ancestral steps with the posterior variance fall a little short of Var z_0 = 1; without the division it would
    # be alpha^2 off
    assert float(z_0.var()) == pytest.approx(1, abs=0.06)
    assert float(alpha**2) < 0.9


def test_save_and_load_in_a_new_process(tmp_path):
    pipe = LatentVDMPipeline(vae(scaling_factor=0.3), unet(), scheduler())
    pipe.save_pretrained(tmp_path)
    levels = images()
    expected = pipe.bound(levels, generator=generator()).nats.detach().double().mean()
    code = f"""
import torch, vdm_diffusers
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(tmp_path)!r})
levels = torch.randint(17, (6, 1, 8, 8), generator=torch.Generator().manual_seed(0))
print(type(pipe).__name__, float(pipe.bound(levels, generator=torch.Generator().manual_seed(0)).nats.detach().double().mean()))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    name, value = result.stdout.split()[-2:]
    assert name == "LatentVDMPipeline"
    assert float(value) == pytest.approx(float(expected), rel=1e-6)


def test_autoencoder_kl_of_diffusers(tmp_path):
    torch.manual_seed(0)
    kl = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=2,
        norm_num_groups=4,
        sample_size=8,
        scaling_factor=0.25,
    )
    pipe = LatentVDMPipeline(kl, unet(), scheduler(), num_levels=17)
    assert (pipe.config.pixel_encoding, pipe.scaling_factor, pipe.shift_factor) == ("endpoint", 0.25, 0.0)
    levels = images()
    with pytest.raises(ValueError, match="decoder_scale"):
        pipe.bound(levels)
    scale = pipe.fit_decoder_scale(levels)
    y = pipe.encode(levels, generator=generator(0))
    mean = kl.decode(y / 0.25).sample
    likelihood = lambda s: float(  # noqa: E731
        discretized_logistic_log_likelihood(levels, mean, s, num_levels=17, pixel_encoding="endpoint").mean()
    )
    assert likelihood(scale) >= max(likelihood(scale * 0.8), likelihood(scale * 1.25))
    assert bool(pipe.bound(levels, generator=generator()).nats.isfinite().all())
    pipe.save_pretrained(tmp_path)
    again = LatentVDMPipeline.from_pretrained(tmp_path)
    assert again.config.decoder_scale == scale
    torch.testing.assert_close(
        again.bound(levels, generator=generator()).nats, pipe.bound(levels, generator=generator()).nats
    )


def test_refusals():
    model = vae()
    with pytest.raises(ValueError, match="num_levels"):
        LatentVDMPipeline(model, unet(), scheduler(), num_levels=256)
    with pytest.raises(ValueError, match="pixel_encoding"):
        LatentVDMPipeline(model, unet(), scheduler(), pixel_encoding="endpoint")
    with pytest.raises(ValueError, match="channels"):
        LatentVDMPipeline(vae(latent_channels=3), unet(), scheduler())
    with pytest.raises(ValueError, match="log SNR"):
        LatentVDMPipeline(model, unet(), VDMScheduler())
    with pytest.raises(ValueError, match="noise_level"):
        LatentVDMPipeline(model, unet(), scheduler()).interpolate(images(1), images(1), noise_level=2.0)
    with pytest.raises(ValueError, match="num_repeats"):
        evaluate_latent_likelihood(model.bound, images(), num_repeats=1)
    with pytest.raises(ValueError, match="no image"):
        evaluate_latent_likelihood(model.bound, images(0))


def test_report_of_a_vae_agrees_with_its_bound_and_the_importance_weighted_one_is_tighter():
    model = vae()
    levels = images(40)
    elbo = evaluate_latent_likelihood(model.bound, levels, num_repeats=30, batch_size=16)
    with torch.no_grad():
        repeated = torch.stack([model.bound(levels, generator=generator(100 + i)).nats for i in range(30)]).mean()
    assert abs(elbo.bits_per_dim - float(repeated) / (64 * math.log(2))) < 5 * 1.5 * elbo.standard_error
    tighter = evaluate_latent_likelihood(
        model.bound,
        levels,
        importance_weighted_bound=model.importance_weighted_bound,
        importance_samples=20,
        num_repeats=8,
    )
    assert tighter.bits_per_dim < elbo.bits_per_dim
    assert (elbo.method, tighter.method) == ("elbo", "importance_weighted")
    assert tighter.prior is None
    assert tighter.num_model_evaluations == 20 * 8 * len(levels)
