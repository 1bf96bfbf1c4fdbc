"""Predictor-corrector sampling through a pipeline, against the variances of a Gaussian, step by step."""

import math
from itertools import pairwise

import pytest
import torch

from vdm_diffusers import VDMPipeline, VDMScheduler, VDMUNet2DModel
from vdm_diffusers.gaussian import alpha_sigma, posterior_coefficients
from vdm_diffusers.pipelines import LangevinCorrector
from vdm_diffusers.prediction import convert

VARIANCE = 4.0


class ExactUNet(VDMUNet2DModel):
    """The denoiser of x ~ N(0, 4), as a prediction of the scheduler's type."""

    def __init__(self, scheduler):
        super().__init__(
            sample_size=4,
            in_channels=1,
            hidden_channels=4,
            layers_per_block=1,
            norm_num_groups=1,
            fourier_exponents=(),
        )
        self.scheduler = scheduler

    def forward(self, sample, timestep, **_):
        log_snr = self.scheduler.log_snr(timestep.double())
        alpha, sigma = alpha_sigma(log_snr)
        gain = (alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)).view(-1, 1, 1, 1)
        x_hat = gain.to(sample.dtype) * sample
        output = convert(x_hat, sample, log_snr, source="sample", target=self.scheduler.config.prediction_type)
        return type("Output", (), {"sample": output})


@pytest.mark.parametrize("prediction_type", ["epsilon", "score", "v_prediction"])
def test_variance_follows_the_recursion_of_predictor_and_corrector(prediction_type):
    scheduler = VDMScheduler(
        beta_schedule="log_snr_linear", log_snr_max=3.0, log_snr_min=-7.0, prediction_type=prediction_type
    )
    pipe = VDMPipeline(ExactUNet(scheduler), scheduler)
    pipe.set_progress_bar_config(disable=True)
    corrector = LangevinCorrector(2, 0.3, generator=torch.Generator().manual_seed(1))
    z_0 = pipe(
        2000, 5, generator=torch.Generator().manual_seed(0), output_type="latent", callback_on_step_end=corrector
    ).images

    def level_variance(log_snr):
        alpha, sigma = alpha_sigma(log_snr)
        return float(VARIANCE * alpha**2 + sigma**2)

    levels = [float(scheduler.log_snr(t)) for t in scheduler.timesteps] + [3.0]
    variance = 1.0
    for t, s in pairwise(levels):
        z_coefficient, x_coefficient, step_variance = map(float, posterior_coefficients(t, s))
        gain = float(alpha_sigma(t)[0]) * VARIANCE / level_variance(t)
        variance = (z_coefficient + x_coefficient * gain) ** 2 * variance + step_variance
        for _ in range(2 if s != levels[-1] else 0):
            h = 2 * (0.3 * float(alpha_sigma(s)[1])) ** 2
            variance = (1 - h / level_variance(s)) ** 2 * variance + 2 * h
    assert abs(float(z_0.var()) / variance - 1) < 5 * math.sqrt(2 / z_0.numel())


def test_refusal():
    with pytest.raises(ValueError, match="num_steps"):
        LangevinCorrector(0)
