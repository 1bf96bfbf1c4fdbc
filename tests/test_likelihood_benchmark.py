"""The benchmark's tables at small size: estimators in their order around the truth, and DDPM's sum beside ours."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import likelihood as benchmark
from mixtures import SpectralMixture

from vdm_diffusers import VDMScheduler, evaluate_likelihood
from vdm_diffusers.decoders import decode_pixels


@pytest.mark.slow
@pytest.mark.parametrize("data", ["mixture", "known images"])
def test_estimators_stand_in_their_order(data):
    """truth = ODE and continuous <= importance-weighted <= discrete, within 5 standard errors."""
    rows = (
        benchmark.order_of_mixture((1, 4, 4), 16, 32) if data == "mixture" else benchmark.order_of_known_images(8, 256)
    )
    ode, continuous, many, few, discrete = rows
    bits = lambda r: r["bits_per_dim"]  # noqa: E731
    error = lambda a, b: 5 * math.hypot(a["standard_error"], b["standard_error"])  # noqa: E731
    for lower, upper in ((many, few), (few, discrete), (continuous, discrete)):
        assert bits(lower) < bits(upper) + error(lower, upper)
    assert bits(discrete) - bits(continuous) > 0
    for bound in (continuous, many, few, discrete):
        assert bound["excess"] > -5 * bound["standard_error"]
    assert abs(continuous["excess"]) < 5 * continuous["standard_error"] + 0.02
    if data == "mixture":  # of known images the flow is another model
        assert abs(ode["excess"]) < 5 * ode["standard_error"] + 0.02


def test_the_sum_over_ddpms_chain_is_the_discrete_bound_without_its_error_bar():
    """Where nothing is clipped the procedure's mean is our estimate of the same chain."""
    data = SpectralMixture.make((1, 4, 4), deviation=0.2)
    levels = decode_pixels(data.sample(24, torch.Generator().manual_seed(1)), 256, "endpoint")
    scheduler = VDMScheduler(num_train_timesteps=60, beta_start=1e-4, beta_end=0.2, clip_sample=False)
    model = benchmark.Exact(data, scheduler)
    sums = torch.stack(
        [benchmark.ddpm_sum(model, levels, scheduler, torch.Generator().manual_seed(i)) for i in range(8)]
    )
    scale = 16 * math.log(2)
    error = float(sums.mean(1).std()) / math.sqrt(8) / scale
    ours = evaluate_likelihood(
        model,
        levels,
        scheduler=scheduler,
        pixel_encoding="endpoint",
        num_samples=480,
        progress_bar=False,
        generator=torch.Generator().manual_seed(0),
    )
    assert abs(float(sums.mean()) / scale - ours.bits_per_dim) < 5 * math.hypot(error, ours.standard_error)
