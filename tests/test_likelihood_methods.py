"""The probability-flow ODE and the K-sample bound against exact densities, and evaluations that are cut off or
shared.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exact_models import GaussianMixture

from vdm_diffusers.decoders import decode_pixels, encode_pixels
from vdm_diffusers.evaluation import evaluate_likelihood
from vdm_diffusers.schedulers.scheduling_vdm import VDMScheduler


def log_snr_scheduler(**kwargs):
    return VDMScheduler(beta_schedule="log_snr_linear", log_snr_max=13.3, log_snr_min=-5.0, **kwargs)


def mixture(deviation=0.1, count=12):
    generator = torch.Generator().manual_seed(0)
    means = 0.4 * torch.randn(3, 1, 2, 4, generator=generator, dtype=torch.float64)
    data = GaussianMixture(means, torch.full((3,), deviation**2).double(), torch.tensor([0.5, 0.3, 0.2]).double())
    return data, data.sample(count, generator).float()


class Differentiable(torch.nn.Module):
    """An exact denoiser as a network: a mixture with its own autograd path."""

    def __init__(self, data, scheduler):
        super().__init__()
        self.data, self.scheduler = data, scheduler
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, sample, timestep):
        log_snr = self.scheduler.log_snr(timestep.double())
        return self.data.predict(sample, log_snr, "epsilon").to(sample.dtype) + 0 * self.weight


def evaluate(model, images, **kwargs):
    kwargs.setdefault("generator", torch.Generator().manual_seed(0))
    return evaluate_likelihood(model, images, progress_bar=False, **kwargs)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_ode_is_the_truth_for_continuous_data(divergence):
    data, x = mixture()
    s = log_snr_scheduler()
    model = Differentiable(data, s)
    report = evaluate(model, x, scheduler=s, method="ode", num_levels=None, num_samples=16, divergence=divergence)
    truth = data.nats(x)
    # the noise of y_0 widens a deviation of 0.1 by e^-6.65: 1e-4 of its variance; the prior misses e^-5 of the signal
    error = math.hypot(report.standard_error, 0.003)
    assert abs(report.bits_per_dim - float(truth.mean()) / 8 / math.log(2)) < 4 * error
    assert report.nats_per_dim == pytest.approx(report.bits_per_dim * math.log(2))
    assert report.standard_error < 0.05 and report.prior is None
    assert report.num_model_evaluations > 12 * 16 * 20


@pytest.mark.parametrize("dequantization", ["none", "uniform", "truncated_normal"])
def test_ode_bounds_the_integers(dequantization):
    """The mass of a bin, under a density that is smooth over bins: -ln(density bin width), which the flow bounds."""
    data, x = mixture()
    levels = decode_pixels(x)
    s = log_snr_scheduler()
    report = evaluate(
        Differentiable(data, s), levels, scheduler=s, method="ode", dequantization=dequantization, divergence="exact"
    )
    mass = data.nats(encode_pixels(levels, dtype=torch.float64)) - 8 * math.log(2 / 256)
    excess = report.bits_per_dim - float(mass.mean()) / 8 / math.log(2)
    # none: draws of deviation 0.0013 in bins of 0.0078 leave the bin's volume unused, ln(0.0078 / (0.0013 sqrt(2 pi
    # e)))
    unused = math.log2(2 / 256 / (math.exp(-13.3 / 2) * math.sqrt(2 * math.pi * math.e)))
    expected = {"none": unused, "truncated_normal": unused, "uniform": 0.0}[dequantization]
    assert report.settings["dequantization"] == dequantization
    assert excess == pytest.approx(expected, abs=4 * report.standard_error + 0.02)


def test_order_of_the_bounds_for_continuous_data():
    """truth <= importance weighted <= discrete, and continuous <= discrete."""
    data, x = mixture()
    s = log_snr_scheduler()
    model = data.as_model(s.log_snr)
    common = {"scheduler": s, "num_levels": None}
    continuous = evaluate(model, x, num_samples=256, **common)
    discrete = evaluate(model, x, method="discrete", num_steps=40, num_samples=800, **common)
    weighted = {
        k: evaluate(model, x, method="importance_weighted", num_steps=40, num_samples=2 * k, **common) for k in (1, 32)
    }
    truth = float(data.nats(x).mean()) / 8 / math.log(2)
    gap = lambda a, b: (a.bits_per_dim - b.bits_per_dim) / math.hypot(a.standard_error, b.standard_error)  # noqa: E731
    assert abs(gap(weighted[1], discrete)) < 4
    assert gap(discrete, weighted[32]) > 4
    assert gap(discrete, continuous) > 4
    assert weighted[32].bits_per_dim > truth - 4 * weighted[32].standard_error
    assert abs(continuous.bits_per_dim - truth) < 4 * continuous.standard_error + 0.02
    assert weighted[32].num_model_evaluations == 12 * 64 * 40


def test_importance_weighted_ddpm_chain_with_one_sample_is_the_discrete_bound():
    data, x = mixture()
    levels = decode_pixels(x, 256, "endpoint")
    s = VDMScheduler(num_train_timesteps=20, beta_start=1e-4, beta_end=0.5, clip_sample=False)
    model = data.as_model(s.log_snr)
    common = {"scheduler": s, "pixel_encoding": "endpoint", "num_steps": 20}
    discrete = evaluate(model, levels, method="discrete", num_samples=800, **common)
    ones = [
        evaluate(
            model,
            levels,
            method="importance_weighted",
            num_samples=2,
            generator=torch.Generator().manual_seed(i),
            **common,
        )
        for i in range(40)
    ]
    mean = sum(r.bits_per_dim for r in ones) / 40
    error = math.sqrt(sum(r.standard_error**2 for r in ones)) / 40
    assert abs(mean - discrete.bits_per_dim) < 4 * math.hypot(error, discrete.standard_error)
    batched = evaluate(model, levels, method="importance_weighted", num_samples=24, batch_size=5, **common)
    assert batched.bits_per_dim < mean


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"method": "ode", "num_samples": 1}, "at least 2, got 1"),
        ({"method": "ode", "dequantization": "triangular"}, "`dequantization` must be"),
        ({"method": "ode", "divergence": "guess"}, "`divergence` must be"),
        ({"method": "ode", "num_levels": None, "dequantization": "uniform"}, "not dequantized"),
        ({"method": "ode", "num_steps": 10}, "belongs to method='discrete'"),
        ({"method": "ode", "target_standard_error": 0.0}, "must be positive, got 0.0"),
        ({"method": "importance_weighted", "num_steps": 9, "max_model_evaluations": 100}, "144 x 2 = 288, got 100"),
        ({"method": "importance_weighted", "num_samples": 1}, "two independent bounds"),
        ({"num_levels": 256}, "integers 0..255, got torch.float32"),
    ],
)
def test_refusals(kwargs, message):
    data, x = mixture(count=2)
    levels = x if "num_levels" in kwargs else decode_pixels(x)
    s = log_snr_scheduler()
    with pytest.raises(ValueError, match=message):
        evaluate(data.as_model(s.log_snr), levels, scheduler=s, **kwargs)


METHODS = {  # the model's evaluations are whole multiples of the images
    "continuous": {"num_samples": 16},
    "discrete": {"num_steps": 30, "num_samples": 16},
    "importance_weighted": {"num_steps": 6, "num_samples": 4},
    "ode": {"num_samples": 4, "tolerance": 1e-2},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_to_its_target_and_stops_at_its_limit(method):
    data, x = mixture(count=10)
    s = log_snr_scheduler()
    model = Differentiable(data, s)
    kwargs = {"scheduler": s, "method": method, "num_levels": None} | METHODS[method]
    first = evaluate(model, x, **kwargs)
    target = first.standard_error / 1.5
    further = evaluate(model, x, **kwargs, target_standard_error=target)
    assert 0.3 * target < further.standard_error <= 1.25 * target  # another part of the evaluations decides
    assert further.num_model_evaluations > first.num_model_evaluations
    difference = math.hypot(first.standard_error, further.standard_error)
    assert abs(further.bits_per_dim - first.bits_per_dim) < 5 * difference
    limit = int(2.2 * first.num_model_evaluations)
    limited = evaluate(model, x, **kwargs, target_standard_error=target / 100, max_model_evaluations=limit)
    assert first.num_model_evaluations < limited.num_model_evaluations <= limit
    assert len(limited.nats) == 10 and bool(limited.nats.isfinite().all())


@pytest.mark.parametrize("method", METHODS)
def test_an_evaluation_that_was_cut_off_goes_on(method, tmp_path):
    data, x = mixture(count=40)
    s = log_snr_scheduler()
    calls = []

    def model(fail_after):
        exact = Differentiable(data, s)

        def call(sample, timestep):
            calls.append(len(sample))
            if len(calls) > fail_after:
                raise KeyboardInterrupt
            return exact(sample, timestep)

        return call

    kwargs = {"scheduler": s, "batch_size": 32, "resume_dir": tmp_path, "generator": None, "num_levels": None}
    kwargs |= {"method": method} | METHODS[method]
    whole = evaluate(model(10**6), x, **(kwargs | {"resume_dir": tmp_path / "other"}))
    evaluations, number = sum(calls), len(calls)
    assert evaluations == whole.num_model_evaluations
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        evaluate(model(2 * number // 3), x, **kwargs)
    calls.clear()
    resumed = evaluate(model(10**6), x, **kwargs)
    assert 0 < sum(calls) < 0.7 * evaluations
    assert torch.equal(whole.nats, resumed.nats) and whole.standard_error == resumed.standard_error
    calls.clear()
    further = evaluate(model(10**6), x, **kwargs, target_standard_error=whole.standard_error / 1.1)
    assert sum(calls) == further.num_model_evaluations - evaluations > 0
    calls.clear()
    assert evaluate(model(10**6), x.flip(0), **kwargs).num_model_evaluations == sum(calls)
    calls.clear()
    assert evaluate(model(10**6), x, **(kwargs | {"batch_size": 50})).num_model_evaluations == sum(calls)


@pytest.mark.slow
def test_two_processes_share_the_images_by_every_method(tmp_path):
    script = tmp_path / "evaluate.py"
    script.write_text(
        """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from test_likelihood_methods import METHODS, Differentiable, mixture, log_snr_scheduler, evaluate
from accelerate import Accelerator
accelerator = Accelerator(cpu=True) if len(sys.argv) > 2 else None
assert accelerator is None or accelerator.num_processes == 2
data, x = mixture(count=41)
s = log_snr_scheduler()
exact, calls = Differentiable(data, s), []
def model(sample, timestep):
    calls.append(len(sample))
    return exact(sample, timestep)
for method, kwargs in METHODS.items():
    calls.clear()
    r = evaluate(model, x, scheduler=s, method=method, num_levels=None, batch_size=32, accelerator=accelerator, **kwargs)
    assert len(r.nats) == 41
    row = ("result", sum(calls), r.num_model_evaluations, repr(float(r.nats.sum())), repr(r.standard_error))
    os.write(1, (" ".join(map(str, row)) + "\\n").encode())  # in one piece: the processes share a pipe
"""
    )
    tests = str(Path(__file__).parent)
    run = lambda *command: subprocess.run(  # noqa: E731
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    alone = run(str(script), tests)
    shared = run(
        "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29561", str(script), tests, "shared"
    )
    rows = [[line.split()[1:] for line in r.stdout.splitlines() if line.startswith("result")] for r in (alone, shared)]
    assert len(rows[0]) == len(METHODS) and len(rows[1]) == 2 * len(METHODS), alone.stderr + shared.stderr
    for own, *rest in rows[0]:
        shares = [int(row[0]) for row in rows[1] if row[1:] == rest]  # both processes got one process's report
        assert len(shares) == 2 and 0 < shares[0] and sum(shares) == int(own) == int(rest[0])
