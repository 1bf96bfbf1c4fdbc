"""The claims of benchmarks/sampler_quality.py."""

import importlib.util
import statistics
import sys
from pathlib import Path

import pytest
import torch

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "sampler_quality.py"


def load_benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("sampler_quality", BENCHMARK)
    quality = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, quality)  # its dataclass looks its module up
    spec.loader.exec_module(quality)
    return quality


@pytest.mark.slow
def test_two_m_at_ten_steps_is_near_the_floor_and_ahead_of_diffusers(monkeypatch):
    quality = load_benchmark(monkeypatch)
    mixture, samplers = quality.Mixture.image_like(), quality.samplers()
    floor = statistics.mean(quality.floor(mixture, 4096, r) for r in range(6))

    def distance(name):
        return statistics.mean(quality.measure(mixture, samplers[name], 10, 4096, r) for r in range(3))

    ours = distance("VDMScheduler 2M, log_snrs to 8 | log SNR")
    assert ours < 1.2 * floor
    diffusers = {name: distance(name) for name in samplers if not name.startswith("VDM") and "as_discrete" not in name}
    assert ours < min(diffusers.values())
    through = distance("DPMSolverMultistepScheduler, trailing | as_discrete")
    assert through < 0.5 * diffusers["DPMSolverMultistepScheduler, trailing | linear"]


@pytest.mark.slow
def test_a_quarter_of_the_steps_suffices_with_the_optimal_variance(monkeypatch):
    quality = load_benchmark(monkeypatch)
    mixture = quality.Mixture.image_like()
    samplers = quality.ancestral_samplers(mixture.optimal_variance())

    def distances(name, steps):
        """Of the same noise and fresh data for every sampler, so that their differences say more than their values."""
        return torch.tensor([quality.measure_ancestral(mixture, samplers[name](), steps, 16384, r) for r in range(3)])

    posterior = distances("posterior | log SNR", 100)
    scalar = distances("optimal | log SNR", 25)
    chosen = distances("optimal | dynamic programming", 25)
    by_frequency = distances("optimal per frequency | dynamic programming", 25)
    for better, worse in [(scalar, posterior), (chosen, posterior), (by_frequency, scalar)]:
        gain = worse - better
        assert float(gain.mean()) > 5 * float(gain.std()) / 3**0.5
    assert float(by_frequency.mean()) < 1.25 * statistics.mean(quality.floor(mixture, 16384, r) for r in range(4))
