"""The claims of benchmarks/sampler_quality.py, at 10 steps."""

import importlib.util
import statistics
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "sampler_quality.py"


@pytest.mark.slow
def test_two_m_at_ten_steps_is_near_the_floor_and_ahead_of_diffusers(monkeypatch):
    spec = importlib.util.spec_from_file_location("sampler_quality", BENCHMARK)
    quality = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, quality)  # its dataclass looks its module up
    spec.loader.exec_module(quality)
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
