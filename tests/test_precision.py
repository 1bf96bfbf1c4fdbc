"""`--mixed_precision auto`: bf16 where the device has units for it, float32 elsewhere."""

import precision
import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture
def cpu_with(monkeypatch, tmp_path):
    def write(flags):
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : fpu sse2 {flags}\n")
        monkeypatch.setattr(precision, "_CPU_INFO", tmp_path / "cpuinfo")

    return write


@pytest.mark.parametrize(
    ("flags", "expected"), [("avx2", "no"), ("avx2 avx512f", "no"), ("avx512_bf16", "bf16"), ("amx_bf16", "bf16")]
)
def test_auto_asks_the_cpu(cpu_with, flags, expected):
    cpu_with(flags)
    assert precision.chosen_precision("auto", CPU) == expected
    assert (precision.slow_bf16("bf16", CPU) is None) == (expected == "bf16")


def test_what_is_asked_for_is_what_is_done(cpu_with):
    cpu_with("avx2")
    assert [precision.chosen_precision(word, CPU) for word in ("no", "fp16", "bf16")] == ["no", "fp16", "bf16"]
    assert precision.slow_bf16("no", CPU) is None


def test_a_cpu_that_does_not_say_gets_float32(monkeypatch, tmp_path):
    monkeypatch.setattr(precision, "_CPU_INFO", tmp_path / "missing")
    assert precision.chosen_precision("auto", CPU) == "no"
    assert precision.slow_bf16("bf16", CPU) is None  # nothing is known, so nothing is claimed


@pytest.mark.parametrize("native", [True, False])
def test_auto_asks_the_gpu_for_units_not_for_emulation(monkeypatch, native):
    asked = {}

    def supported(including_emulation=True):
        asked["emulation"] = including_emulation
        return native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert precision.chosen_precision("auto", torch.device("cuda")) == ("bf16" if native else "no")
    assert asked == {"emulation": False}
