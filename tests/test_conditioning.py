"""Guidance, image to image, interpolation, and inpainting that tends to the exact conditional distribution."""

import math

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput

from vdm_diffusers import VDMPipeline, VDMScheduler, VDMUNet2DModel
from vdm_diffusers.decoders import encode_pixels
from vdm_diffusers.pipelines.conditioning import guide, image_tensor, slerp

LOG_SNR = {"beta_schedule": "log_snr_linear", "log_snr_max": 8.0, "log_snr_min": -8.0}


class ExactGaussian(ModelMixin, ConfigMixin):
    """The exact denoiser of x ~ N(mean, covariance) over all pixels: eps_hat = sigma S^-1 (z - alpha mean), S =
    alpha^2 C + sigma^2.
    """

    @register_to_config
    def __init__(self, in_channels: int = 1, sample_size: tuple = (1, 2)):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, sample, timestep):
        log_snr = self.scheduler.log_snr(timestep[:1].double().cpu())[0]
        alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        matrix = alpha**2 * self.covariance + sigma**2 * torch.eye(len(self.mean)).double()
        z = sample.double().flatten(1) - alpha * self.mean
        return UNet2DOutput(sample=(sigma * torch.linalg.solve(matrix, z.T).T).reshape(sample.shape).to(sample.dtype))


def gaussian_pipeline(mean, covariance, **config) -> VDMPipeline:
    mean, covariance = torch.tensor(mean).double(), torch.tensor(covariance).double()
    unet = ExactGaussian(sample_size=(1, len(mean)))
    unet.mean, unet.covariance = mean, covariance
    unet.scheduler = VDMScheduler(clip_sample=False, **LOG_SNR | config)
    pipe = VDMPipeline(unet, unet.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def class_unet(**config) -> VDMUNet2DModel:
    torch.manual_seed(0)
    unet = VDMUNet2DModel(
        sample_size=4, in_channels=1, hidden_channels=8, layers_per_block=1, norm_num_groups=4, dropout=0.0,
        fourier_exponents=(3,), num_class_embeds=3, **config,
    )  # fmt: skip
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return unet.eval()


def class_pipeline(**config) -> VDMPipeline:
    pipe = VDMPipeline(class_unet(), VDMScheduler(clip_sample=False, **LOG_SNR | config), num_levels=17)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- guidance --------------------------------------------------------------------------------------------------------


def test_guidance_runs_between_the_two_predictions():
    pipe = class_pipeline()
    options = {"num_inference_steps": 4, "output_type": "latent"}

    def sample(**arguments):
        return pipe(**options, generator=generator(), **arguments).images

    labels = [0, 2]
    plain, null = sample(class_labels=labels), sample(class_labels=[3, 3])
    assert torch.equal(sample(class_labels=labels, guidance_scale=1.0), plain)
    torch.testing.assert_close(sample(class_labels=labels, guidance_scale=0.0), null, rtol=1e-4, atol=1e-4)
    # driven away from itself a class is where it was, at any scale
    same = sample(class_labels=labels, guidance_scale=4.0, negative_class_labels=labels)
    torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-4)
    guided = sample(class_labels=labels, guidance_scale=3.0)
    assert not torch.allclose(guided, plain, atol=1e-2)
    # one deterministic step is affine in the prediction: guidance extrapolates its result
    pipe = class_pipeline(stochasticity=0.0)
    options["num_inference_steps"] = 1
    plain, null = sample(class_labels=labels), sample(class_labels=[3, 3])
    guided = sample(class_labels=labels, guidance_scale=3.0)
    torch.testing.assert_close(guided, null + 3 * (plain - null), rtol=1e-3, atol=1e-3)


def test_guidance_leaves_a_learned_variance_alone():
    a, b = torch.randn(2, 5, 6, 3, 2, generator=generator())
    guided = guide(a, b, 2.5, 3)
    torch.testing.assert_close(guided[:, :3], b[:, :3] + 2.5 * (a[:, :3] - b[:, :3]))
    assert torch.equal(guided[:, 3:], a[:, 3:])


# --- images to start from --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixel_encoding", ["bin_center", "endpoint"])
def test_every_kind_of_image_is_the_same_image(pixel_encoding):
    levels = torch.randint(0, 256, (2, 3, 5, 4), generator=generator())
    expected = encode_pixels(levels, 256, pixel_encoding, torch.float64)
    pt = levels.double() / 255
    np_images = pt.movedim(1, -1).numpy()
    pil = [PIL.Image.fromarray(one.permute(1, 2, 0).byte().numpy()) for one in levels]
    for image in (levels, levels.to(torch.uint8), pt, np_images, pil):
        torch.testing.assert_close(image_tensor(image, 256, pixel_encoding), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(image_tensor(pil[0], 256, pixel_encoding), expected[:1], rtol=0, atol=1e-12)
    grey = PIL.Image.fromarray(np.zeros((5, 4), dtype=np.uint8))
    assert image_tensor(grey, 256, pixel_encoding).shape == (1, 1, 5, 4)


@pytest.mark.parametrize("scheduler", ["vdm", "ddpm", "ddim"])
def test_image_to_image_has_the_distribution_of_noise_and_denoise(scheduler):
    # x ~ N(m, v): x_0 -> z_t -> a draw of p(x | z_t). Mean and variance follow from the joint Gaussian of (z_t, x).
    mean, variance, num = 0.1, 0.04, 4000
    pipe = gaussian_pipeline([mean], [[variance]])
    if scheduler == "vdm":
        level = pipe.scheduler.log_snr
    else:
        kind = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[scheduler]
        table = VDMScheduler(num_train_timesteps=200, clip_sample=False)
        pipe.unet.scheduler = table
        pipe = VDMPipeline(pipe.unet, kind(num_train_timesteps=200, clip_sample=False), pixel_encoding="bin_center")
        pipe.set_progress_bar_config(disable=True)
        level = table.log_snr
    start = 0.5
    image = torch.full((num, 1, 1, 1), (start + 1) / 2 * 256 / 255 - 0.5 / 255)
    steps = 200
    out = pipe(
        image=image, strength=0.6, num_inference_steps=steps, generator=generator(3), output_type="latent"
    ).images
    index = steps - round(0.6 * steps)
    log_snr = level(pipe.scheduler.timesteps[index].double())
    alpha, sigma_square = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid()
    gain = variance * alpha / (alpha**2 * variance + sigma_square)
    expected = float(mean + gain * (alpha * start - alpha * mean))
    from_noise = float(gain**2 * sigma_square)
    kept = float(variance * sigma_square / (alpha**2 * variance + sigma_square))
    if scheduler == "ddim":  # deterministic: the spread of z_t, scaled to that of x
        marginal = alpha**2 * variance + sigma_square
        expected = float(mean + (variance / marginal).sqrt() * alpha * (start - mean))
        from_noise, kept = float(variance / marginal * sigma_square), 0.0
    spread = from_noise + kept
    assert abs(float(out.mean()) - expected) < 5 * math.sqrt(spread / num) + 0.01
    assert float(out.var()) == pytest.approx(spread, rel=0.15)


def test_a_little_strength_changes_little():
    pipe = class_pipeline()
    levels = torch.randint(0, 17, (2, 1, 4, 4), generator=generator())
    options = {"class_labels": [0, 1], "num_inference_steps": 20, "output_type": "pt"}
    near = pipe(image=levels, strength=0.05, generator=generator(), **options).images
    assert float((near - levels / 16).abs().max()) < 1.5 / 16
    calls = []
    pipe(
        image=levels, strength=0.3, callback_on_step_end=lambda p, i, t, tensors: calls.append(i) or {}, **options
    )  # fmt: skip
    assert calls == [14, 15, 16, 17, 18, 19]


def test_interpolation_goes_from_one_image_to_the_other():
    pipe = class_pipeline()
    first, second = torch.randint(0, 17, (2, 1, 1, 4, 4), generator=generator())
    options = {"num_images": 5, "class_labels": 1, "num_inference_steps": 20, "output_type": "pt"}
    images = pipe.interpolate(first, second, strength=0.05, generator=generator(), **options)
    assert images.shape == (5, 1, 4, 4)
    assert float((images[0] - first[0] / 16).abs().max()) < 1.5 / 16 > float((images[4] - second[0] / 16).abs().max())
    again = pipe.interpolate(first, second, strength=0.05, generator=generator(), **options)
    assert torch.equal(images, again)
    constant = pipe.interpolate(first, first, strength=0.7, generator=generator(), **options)
    assert torch.equal(constant, constant[:1].expand_as(constant))  # the same noise for all
    with pytest.raises(ValueError, match="one image each"):
        pipe.interpolate(torch.cat([first, first]), second, num_images=3)


def test_slerp_keeps_latents_standard_normal():
    a, b = torch.randn(2, 3, 4, 50, 50, generator=generator(1))
    for fraction in (0.0, 0.3, 0.5, 1.0):
        between = slerp(a, b, fraction)
        assert between.shape == a.shape and float(between.std()) == pytest.approx(1, abs=0.02)
    assert torch.allclose(slerp(a, b, 0.0), a, atol=1e-6) and torch.allclose(slerp(a, b, 1.0), b, atol=1e-6)
    torch.testing.assert_close(slerp(a, a, 0.4), a, rtol=1e-4, atol=1e-4)


# --- known regions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vdm", "betas", "ddpm"])
def test_known_pixels_come_out_as_they_went_in(kind):
    scheduler = {
        "vdm": VDMScheduler(clip_sample=False, **LOG_SNR | {"log_snr_max": 13.3}),
        "betas": VDMScheduler(num_train_timesteps=100),
        "ddpm": DDPMScheduler(num_train_timesteps=100),
    }[kind]
    pipe = VDMPipeline(class_unet(), scheduler, num_levels=17)
    pipe.set_progress_bar_config(disable=True)
    levels = torch.randint(0, 17, (1, 1, 4, 4), generator=generator())
    mask = torch.zeros(4, 4)
    mask[:2, 1:] = 1
    images = pipe(
        image=levels,
        mask=mask,
        class_labels=[0, 1, 2],
        num_inference_steps=10,
        generator=generator(),
        output_type="pt",
    ).images
    known = (mask == 0).expand(3, 1, 4, 4)
    assert torch.equal((images * 16).round()[known], levels.expand(3, 1, 4, 4).float()[known])
    assert not torch.equal(images[0], images[1])


def test_particles_tend_to_the_exact_conditional_distribution():
    # x = (x_1, x_2) with correlation 0.9; x_1 is known. Truth: x_2 | x_1 ~ N(m_2 + c / v (x_1 - m_1), v - c^2 / v).
    variance, covariance, known = 0.09, 0.081, 0.45
    pipe = gaussian_pipeline([0.0, 0.0], [[variance, covariance], [covariance, variance]])
    value = (known + 1) / 2 * 256 / 255 - 0.5 / 255
    image = torch.full((1, 1, 1, 2), value)
    options = {"image": image, "mask": torch.tensor([[0, 1]]), "num_inference_steps": 60, "output_type": "latent"}
    exact_mean, exact_variance = covariance / variance * known, variance - covariance**2 / variance

    def moments(num, **more):
        out = pipe(batch_size=num, generator=generator(7), **options, **more).images[:, 0, 0].double()
        assert float((out[:, 0] - known).abs().max()) < 1e-3  # alpha_0 = 0.9998
        return float(out[:, 1].mean()), float(out[:, 1].var())

    replaced, _ = moments(1000)
    mean, spread = moments(1000, num_particles=32)
    # z_0 has the noise of log SNR 8, e^-8 = 0.0003, besides
    assert abs(mean - exact_mean) < 0.02
    assert spread == pytest.approx(exact_variance, rel=0.25)
    assert abs(replaced - exact_mean) > 0.05 > 2 * abs(mean - exact_mean)


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_conditions_that_do_not_fit_are_named():
    pipe = class_pipeline()
    levels = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    for arguments, message in [
        ({"guidance_scale": 2.0}, "needs `class_labels`"),
        ({"class_labels": 1, "negative_class_labels": 2}, "need a `guidance_scale`"),
        ({"mask": torch.ones(4, 4), "class_labels": 1}, "need an `image`"),
        ({"image": levels, "strength": 0.0, "class_labels": 1}, "strength"),
        ({"image": levels, "strength": 1.5, "class_labels": 1}, "strength"),
        ({"image": levels, "batch_size": 3, "class_labels": 1}, "one image or 3"),
        ({"image": levels.double() + 7, "class_labels": 1}, "floats in"),
        ({"image": levels + 17, "class_labels": 1}, "levels 0..16"),
        ({"image": levels[0], "class_labels": 1}, "PIL images"),
        ({"image": levels, "mask": torch.ones(3, 3), "class_labels": 1}, "broadcastable"),
        ({"image": levels, "num_particles": 4, "class_labels": 1}, "needs a `mask`"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe(num_inference_steps=2, **arguments)
    mask = torch.ones(4, 4)
    for other in (class_pipeline(stochasticity=0.0), VDMPipeline(class_unet(), DDPMScheduler(), num_levels=17)):
        with pytest.raises(ValueError, match="ancestral|stochasticity=1"):
            other(image=levels, mask=mask, num_particles=2, class_labels=1, num_inference_steps=2)
    with pytest.raises(ValueError, match="list of generators"):
        pipe(
            image=levels, mask=mask, num_particles=2, class_labels=1, num_inference_steps=2,
            generator=[generator(), generator()],
        )  # fmt: skip
