"""Walks over everything public: a senseless value is refused at once, by the name of its argument, before a network
is asked anything.
"""

import dataclasses
import inspect
import typing

import pytest
import torch
from arguments import GROUPS, EvaluateArguments, parse_arguments, parse_evaluation

from vdm_diffusers import (
    LatentVDMPipeline,
    VariationalAutoencoder,
    VDMFlowScheduler,
    VDMPipeline,
    VDMScheduler,
    VDMSigmaScheduler,
    VDMUNet2DModel,
    estimate_optimal_variance,
    evaluate_latent_likelihood,
    evaluate_likelihood,
)


class Untouched(torch.nn.Module):
    """A network that must not be called."""

    def forward(self, *args, **kwargs):
        raise AssertionError("the network was asked before the arguments were looked at")


SCHEDULER = VDMScheduler(beta_schedule="log_snr_linear")
IMAGES = torch.randint(0, 256, (3, 1, 4, 4), generator=torch.Generator().manual_seed(0))


def pipe():
    sizes = {"hidden_channels": 8, "layers_per_block": 1, "norm_num_groups": 4, "fourier_exponents": ()}
    unet = VDMUNet2DModel(sample_size=4, in_channels=1, **sizes)
    unet.forward = Untouched().forward
    return VDMPipeline(unet, SCHEDULER)


def latent():
    vae = VariationalAutoencoder(8, 1, 2, (8, 8), norm_num_groups=4)
    sizes = {"hidden_channels": 8, "layers_per_block": 1, "norm_num_groups": 4, "fourier_exponents": ()}
    unet = VDMUNet2DModel(sample_size=4, in_channels=2, **sizes)
    unet.forward = Untouched().forward
    return LatentVDMPipeline(vae, unet, SCHEDULER)


# function, what it is called with, and for each argument values that cannot be
FUNCTIONS = {
    "evaluate_likelihood": (
        evaluate_likelihood,
        {"model": Untouched(), "images": IMAGES, "scheduler": SCHEDULER, "progress_bar": False},
        {
            "model": [3, None],
            "images": [torch.rand(3, 1, 4, 4) * 3, torch.zeros(0, 1, 4, 4, dtype=torch.long), "missing"],
            "scheduler": [None],
            "method": ["nonsense"],
            "num_steps": [0, -3, 2.5],
            "grid": ["nonsense", [1.0]],
            "num_samples": [0, 1, 2.5],
            "num_levels": [1, 0, 2.5, "many"],
            "pixel_encoding": ["nonsense"],
            "batch_size": [0, -1],
            "class_labels": ["nonsense", [1, 2]],
            "model_kwargs": [{"guidance_scale": 2.0}],
            "variance_type": ["nonsense"],
            "target_standard_error": [0.0, -1.0],
            "max_model_evaluations": [0, -1],
            "dequantization": ["nonsense"],
            "divergence": ["nonsense"],
            "tolerance": [0.0, -1.0],
            "generator": ["nonsense"],
        },
    ),
    "estimate_optimal_variance": (
        estimate_optimal_variance,
        {"model": Untouched(), "images": IMAGES, "scheduler": SCHEDULER, "progress_bar": False, "num_knots": 8},
        {
            "model": [3],
            "images": [torch.rand(3, 1, 4, 4) * 3],
            "form": ["nonsense"],
            "num_knots": [0, -1],
            "num_samples": [0, 1],
            "num_levels": [1, "many"],
            "pixel_encoding": ["nonsense"],
            "batch_size": [0],
            "class_labels": ["nonsense"],
            "model_kwargs": [{"guidance_scale": 2.0}],
        },
    ),
    "evaluate_latent_likelihood": (
        evaluate_latent_likelihood,
        {"bound": Untouched(), "levels": IMAGES},
        {
            "levels": [torch.rand(3, 1, 4, 4)],
            "importance_samples": [0, -1],
            "num_repeats": [0, 1],
            "batch_size": [0],
            "target_standard_error": [0.0, -1.0],
            "max_model_evaluations": [0],
        },
    ),
    "VDMPipeline.__call__": (
        lambda **kwargs: pipe()(**kwargs),
        {"num_inference_steps": 3},
        {
            "batch_size": [0, -1, 2.5],
            "num_inference_steps": [0, -1, 2.5],
            "class_labels": [[1, 2, 3]],
            "latents": [torch.zeros(1, 3, 4, 4)],
            "output_type": ["nonsense"],
            "callback_on_step_end_tensor_inputs": [["nonsense"]],
            "guidance_scale": [3.0],
            "negative_class_labels": [1],
            "strength": [0.5],
            "mask": [torch.zeros(4, 4)],
            "num_particles": [0, 4],
            "generator": ["nonsense"],
        },
    ),
    "LatentVDMPipeline.__call__": (
        lambda **kwargs: latent()(**kwargs),
        {"num_inference_steps": 3},
        {
            "batch_size": [0, -1],
            "num_inference_steps": [0, -1],
            "latents": [torch.zeros(1, 3, 4, 4)],
            "output_type": ["nonsense"],
            "class_labels": [[1, 2, 3]],
        },
    ),
    "VDMScheduler.set_timesteps": (
        lambda **kwargs: VDMScheduler().set_timesteps(**kwargs),
        {},
        {"num_inference_steps": [0, -1, 2.5, 1001], "timesteps": [[], [1, 2], [2000]], "log_snrs": [[], [99.0]]},
    ),
    "VDMFlowScheduler.set_timesteps": (
        lambda **kwargs: VDMFlowScheduler().set_timesteps(**kwargs),
        {},
        {"num_inference_steps": [0, -1, 2.5], "timesteps": [[], [1, 2], [2000]], "sigmas": [[], [0.1, 0.9], [5.0]]},
    ),
    "VDMSigmaScheduler.set_timesteps": (
        lambda **kwargs: VDMSigmaScheduler().set_timesteps(**kwargs),
        {},
        {"num_inference_steps": [0, -1, 2.5], "sigmas": [[], [0.1, 0.9], [-5.0]]},
    ),
}
CASES = [
    (name, key, value) for name, (_, _, odd) in FUNCTIONS.items() for key, values in odd.items() for value in values
]


@pytest.mark.parametrize(("name", "key", "value"), CASES, ids=[f"{n}-{k}-{i}" for i, (n, k, _) in enumerate(CASES)])
def test_a_senseless_value_is_refused_before_the_network_is_asked(name, key, value):
    function, usual, _ = FUNCTIONS[name]
    extra = {"dequantization": {"method": "ode"}, "divergence": {"method": "ode"}, "tolerance": {"method": "ode"}}
    extra |= {
        "num_steps": {"method": "discrete"},
        "grid": {"method": "discrete"},
        "max_model_evaluations": {"target_standard_error": 0.1},
    }
    more = extra.get(key, {}) if name.startswith("evaluate_l") else {}
    known = inspect.signature(function).parameters if name.startswith("e") else None
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as error:
        function(**{**usual, **{k: v for k, v in more.items() if known is None or k in known}, key: value})
    message = str(error.value)
    assert 0 < len(message) < 600 and "\n" not in message.strip(), message


def arguments_of(kinds):
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            yield field.name, hints[field.name], field


def senseless(hint):
    """A value for an argument of this type that it cannot have."""
    text = str(hint)
    if "Literal" in text:
        return "nonsense"
    if "bool" in text:
        return "perhaps"
    if "int" in text or "float" in text:
        return "-1e30"
    return None


TRAINING = [(name, value) for name, hint, _ in arguments_of(GROUPS) if (value := senseless(hint)) is not None]
EVALUATION = [
    (name, value) for name, hint, _ in arguments_of([EvaluateArguments]) if (value := senseless(hint)) is not None
]


@pytest.mark.parametrize(("name", "value"), TRAINING, ids=[name for name, _ in TRAINING])
def test_every_training_argument_refuses_a_senseless_value(name, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(["--output_dir", "nowhere", f"--{name}={value}"])
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and name in said and len(said.splitlines()) == 1, said


@pytest.mark.parametrize(("name", "value"), EVALUATION, ids=[name for name, _ in EVALUATION])
def test_every_argument_of_evaluate_refuses_a_senseless_value(name, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_evaluation(["--checkpoint", "nowhere", f"--{name}={value}"])
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and name in said and len(said.splitlines()) == 1, said
