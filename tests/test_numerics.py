"""The small helpers of the core, and the core's promise that everything public says what it is."""

import ast
import inspect
from pathlib import Path

import mpmath as mp
import pytest
import torch

from vdm_diffusers import VDMScheduler, numerics
from vdm_diffusers.numerics import (
    as_float64,
    compute_dtype,
    expand_to,
    linear_combination,
    minus_log1p,
    on_host,
    shown,
    sum_except_batch,
)

CORE = ("numerics", "noise_schedules", "gaussian", "prediction", "time_sampling", "decoders", "elbo", "objectives")


def test_dtypes():
    assert as_float64(0.1).dtype == torch.float64 and float(as_float64(0.1)) == 0.1
    assert as_float64(torch.tensor([3])).dtype == torch.float64
    half, single, double = (torch.zeros(1, dtype=d) for d in (torch.bfloat16, torch.float32, torch.float64))
    assert compute_dtype(half) == compute_dtype(half, half.half()) == compute_dtype(half, single) == torch.float32
    assert compute_dtype(half, double) == torch.float64
    assert on_host(half, single)


def test_coefficients_go_along_the_first_dimensions():
    like = torch.zeros(3, 4, 5)
    assert expand_to(torch.tensor(2.0), like).shape == (1, 1, 1)
    assert expand_to(torch.ones(3), like).shape == (3, 1, 1)
    assert expand_to(torch.ones(1), like).shape == (1, 1, 1)
    assert expand_to(torch.ones(3, 4), like).shape == (3, 4, 1)
    assert expand_to(torch.ones(3).double(), like).dtype == torch.float32
    assert expand_to(torch.ones(3), like, torch.float64).dtype == torch.float64
    for wrong in (torch.ones(4), torch.ones(3, 5), torch.ones(3, 1, 1, 1)):
        with pytest.raises(ValueError, match="does not go with"):
            expand_to(wrong, like)
    # a batch as large as the next dimension is the case that broadcasting alone gets wrong
    x = torch.ones(3, 3)
    assert linear_combination(torch.tensor([1.0, 2.0, 3.0]), x, torch.tensor(0.0), x).tolist() == [
        [1.0] * 3,
        [2.0] * 3,
        [3.0] * 3,
    ]


def test_sums():
    assert sum_except_batch(torch.ones(2, 3, 4)).tolist() == [12.0, 12.0]
    assert sum_except_batch(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]


def test_minus_log1p():
    with mp.workdps(50):
        for x in (1e-300, 1e-18, -1e-9, 3e-5, -0.003, 0.00999, 0.01, -0.01, 0.2, -0.5, -0.999, 7.0, 1e12):
            exact = mp.mpf(x) - mp.log1p(mp.mpf(x))
            got = float(minus_log1p(torch.tensor(x, dtype=torch.float64)))
            assert abs(mp.mpf(got) - exact) <= 5e-14 * exact, x
    x = torch.tensor([-0.3, -0.005, 0.0, 0.002, 0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(minus_log1p, (x,))


def public_definitions(tree):
    """Functions, classes and methods without a leading underscore; a method that overrides one of its base is
    described there.
    """
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node, False
            if isinstance(node, ast.ClassDef):
                methods = [m for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith("_")]
                yield from ((method, bool(node.bases)) for method in methods)


@pytest.mark.parametrize("module", CORE)
def test_docstrings_say_what_is_returned_and_raised(module):
    path = Path(inspect.getfile(numerics)).with_name(f"{module}.py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    definitions = list(public_definitions(tree))
    assert definitions
    for node, overrides in definitions:
        docstring = ast.get_docstring(node)
        assert docstring or overrides, f"{module}.{node.name} has no docstring"
        if isinstance(node, ast.FunctionDef) and any(isinstance(n, ast.Raise) for n in ast.walk(node)):
            assert docstring and "Raise" in docstring, f"{module}.{node.name} does not say what it raises"


def test_errors_show_few_values():
    assert shown(torch.tensor([1.0, 2.5])) == "[1.0, 2.5]" and shown(torch.tensor(3.0)) == "3.0"
    assert shown(torch.arange(1000.0)) == "1000 values from 0.0 to 999.0"
    with pytest.raises(ValueError, match="512 values from 20.0 to 20.0"):
        VDMScheduler(beta_schedule="log_snr_linear").timestep_from_log_snr(torch.full((512,), 20.0))
