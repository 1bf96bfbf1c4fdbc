"""Text-to-image and latent pipelines of Diffusers, as a model of latents: network, scheduler, latents, and what the
network is told.

How a pipeline turns a prompt into arguments of its network differs from class to class. So the pipeline does it
itself: it is run without guidance up to the first call of its network, and the arguments of that call are kept. The
estimators then call the network with the same arguments and noisy latents of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vdm_diffusers.evaluation.images import to_levels

_SAMPLES = ("sample", "hidden_states", "x", "latents")  # what networks call the noisy data
_TIMES = ("timestep", "timesteps", "t")
_NOT_KEPT = ("return_dict",)
_NESTED = "__"  # of an argument within an argument: added_cond_kwargs__text_embeds
_ENCODED = 16  # images encoded at a time


class _Captured(Exception):
    """The network was called: ends the pipeline's run, and is no error."""


class PromptedNetwork(nn.Module):
    """A pipeline's network as `(sample, timestep, **kept arguments) -> prediction`.

    Attributes:
        network: the pipeline's own.
        sample_name, time_name: what it calls its two arguments.
        time_scale: by which it wants the scheduler's timesteps multiplied.
        time_dtype: of the timestep, where it is a float.
        shared: arguments that are the same for all images.
    """

    def __init__(
        self,
        network: nn.Module,
        sample_name: str,
        time_name: str,
        time_scale: float,
        time_dtype: torch.dtype | None,
        shared: dict[str, Any],
    ):
        super().__init__()
        self.time_dtype = time_dtype
        self.network, self.shared = network, shared
        self.sample_name, self.time_name, self.time_scale = sample_name, time_name, time_scale

    @property
    def dtype(self) -> torch.dtype:
        """The network's own."""
        return getattr(self.network, "dtype", next(self.network.parameters()).dtype)

    def forward(self, sample: Tensor, timestep: Tensor, **kept: Any) -> Any:
        """The network's answer; `kept` are arguments with one row for each image of the batch."""
        time = timestep if self.time_scale == 1 else timestep * self.time_scale
        own = {self.sample_name: sample, self.time_name: time if self.time_dtype is None else time.to(self.time_dtype)}
        output = self.network(**own, **_nested(self.shared | kept), return_dict=False)
        output = output[0] if isinstance(output, (tuple, list)) else output
        return torch.stack(list(output)) if isinstance(output, (tuple, list)) else output


@dataclass(frozen=True, eq=False)
class LatentTask:
    """A model of latents and its data.

    Attributes:
        network: takes `kept` arguments, one row for each prompt.
        scheduler: the pipeline's.
        latents: (N, ...) floats in the network's own units.
        kept: name -> (K, ...) rows of the K different prompts (or class labels).
        prompt_of: (N,) the row of each image.
        levels: (N, 3, H, W) the images, where the pipeline is one of pixels; else None.
    """

    network: PromptedNetwork
    scheduler: Any
    latents: Tensor
    kept: dict[str, Tensor]
    prompt_of: Tensor
    levels: Tensor | None

    @property
    def data(self) -> dict[str, Any]:
        """What `Candidate.of` is told about the data: latents are continuous, the pixels of a pixel-space pipeline
        are 256 levels.
        """
        return {"num_levels": None} if self.levels is None else {"num_levels": 256, "pixel_encoding": "endpoint"}


def is_latent_pipeline(model: Any) -> bool:
    """Whether `model` is one of Diffusers' pipelines with an autoencoder (or a transformer that is told a prompt) and
    a scheduler.
    """
    components = getattr(model, "components", None)
    if not isinstance(components, dict) or components.get("scheduler") is None:
        return False
    return any(components.get(part) is not None for part in ("vae", "text_encoder")) or (
        components.get("transformer") is not None and components.get("unet") is None
    )


@torch.no_grad()
def in_latent_space(
    pipe: Any,
    images: Any,
    *,
    prompts: str | Sequence[str] | None = None,
    class_labels: int | Sequence[int] | Tensor | None = None,
    one_for_each: bool = True,
) -> LatentTask:
    """The latents of images, and the network as the pipeline would call it for the prompts or labels.

    Args:
        pipe: a text-to-image or class-to-image pipeline with `vae`, `scheduler` and `unet` or `transformer`.
        images: integers 0..255 (N, 3, H, W), PIL images, or batches of them.
        prompts: one for all images or one for each; `None` for a pipeline without text: "" otherwise.
        class_labels: the same, of a class-to-image pipeline.
        one_for_each: prompts belong to the images. False: they are alternatives for all of them.
    Raises:
        ValueError: a pipeline that has no such parts or calls its network in a way that is not understood; prompts
            that it cannot take, or of another number than the images.
    """
    name = type(pipe).__name__
    network = pipe.components.get("transformer")
    network = pipe.components.get("unet") if network is None else network
    if not isinstance(network, nn.Module):
        raise ValueError(f"`model`, a {name}, has neither `unet` nor `transformer`: its likelihood is not known here.")
    levels = _integers(images)
    takes = inspect.signature(pipe.__call__).parameters
    given = _given(pipe, takes, prompts, class_labels, len(levels) if one_for_each else None)
    different = list(dict.fromkeys(given))
    size = (levels.shape[-2], levels.shape[-1])
    captured = [_capture(pipe, network, takes, value, size) for value in different]
    first = captured[0]
    kept, shared = _sorted_out([c.arguments for c in captured], name)
    latents = _encode(pipe, levels, first.shape)
    prompted = PromptedNetwork(network, first.sample_name, first.time_name, first.time_scale, first.time_dtype, shared)
    rows = torch.tensor([different.index(value) for value in given])
    task = LatentTask(
        prompted,
        pipe.scheduler,
        latents,
        kept,
        rows if one_for_each else torch.arange(len(different)),
        levels if pipe.components.get("vae") is None else None,
    )
    _try(task, name)
    return task


def _try(task: LatentTask, name: str) -> None:
    """Call the network for two images at once, as the estimators will. Raises ValueError if it cannot be called so."""
    device, dtype = next(task.network.parameters()).device, task.network.dtype
    sample = torch.randn(2, *task.latents.shape[1:], generator=torch.Generator().manual_seed(0)).to(device, dtype)
    kept = {key: rows[[0, -1]].to(device) for key, rows in task.kept.items()}
    try:
        output = task.network(sample, torch.tensor([10, 10], device=device), **kept)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"the network of a {name} cannot be called for several images at once ({_short(error)})."
        ) from error
    if output.shape[2:] != sample.shape[2:] or output.shape[1] not in (sample.shape[1], 2 * sample.shape[1]):
        raise ValueError(f"the network of a {name} answers {tuple(output.shape)} to a sample {tuple(sample.shape)}.")


def _integers(images: Any) -> Tensor:
    if isinstance(images, Tensor) or not isinstance(images, (list, tuple)):
        levels = to_levels(images, 256)
    else:
        levels = torch.cat([to_levels(one, 256) for one in images])
    return levels.expand(-1, 3, -1, -1) if levels.shape[1] == 1 else levels


def _given(
    pipe: Any, takes: Mapping[str, Any], prompts: Any, class_labels: Any, number: int | None
) -> list[str | int | None]:
    """What the pipeline is told for each image: prompts, labels, or nothing."""
    name = type(pipe).__name__
    if prompts is not None and "prompt" not in takes:
        raise ValueError(f"`prompts` were given, and a {name} takes none.")
    if prompts is not None and not any(
        "encoder" in part and value is not None for part, value in pipe.components.items()
    ):
        raise ValueError(f"`prompts` were given, and this {name} has no text encoder: load it with one.")
    if class_labels is not None and "class_labels" not in takes:
        raise ValueError(f"`class_labels` were given, and a {name} takes none.")
    told: Any = prompts if prompts is not None else class_labels
    if told is None:
        if "class_labels" in takes:
            raise ValueError(f"`class_labels` are needed: a {name} is told the class.")
        told = "" if "prompt" in takes else None
    if isinstance(told, Tensor):
        told = told.tolist()
    if told is None or isinstance(told, (str, int)):
        return [told] * (number or 1)
    if number is not None and len(told) != number:
        raise ValueError(
            f"`{'prompts' if prompts is not None else 'class_labels'}` must be one, or one for each of the {number} "
            f"images, got {len(told)}."
        )
    return list(told)


class _Call(NamedTuple):
    """How a pipeline called its network."""

    sample_name: str
    time_name: str
    time_scale: float
    time_dtype: torch.dtype | None
    arguments: dict[str, Any]  # besides the two
    shape: tuple[int, ...]  # of the sample


def _capture(
    pipe: Any, network: nn.Module, takes: Mapping[str, Any], told: str | int | None, size: tuple[int, int]
) -> _Call:
    """The network's first call in the pipeline that is told a prompt or class."""
    name, calls = type(pipe).__name__, []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments)
        raise _Captured

    options: dict[str, Any] = {
        "prompt": told,
        "class_labels": [told],
        "height": size[0],
        "width": size[1],
        "num_frames": 1,
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "true_cfg_scale": 1.0,
        "output_type": "latent",
        "use_resolution_binning": False,
        "clean_caption": False,
    }
    options = {key: value for key, value in options.items() if key in takes and value not in (None, [None])}
    config = dict(pipe.scheduler.config)
    scheduler = pipe.scheduler
    pipe.scheduler = type(scheduler).from_config(config)  # whose timesteps the pipeline sets
    shown = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    handle = network.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        pipe(**options)
    except _Captured:
        pass
    except Exception as error:
        if not calls:
            wanted = [n for n in ("image", "video", "control_image", "mask_image") if n in takes]
            more = f" It takes {' and '.join(wanted)} besides, which is not supported." if wanted else ""
            raise ValueError(
                f"a {name} could not be run for {told!r} at {size[0]}x{size[1]}, which its likelihood needs "
                f"({_short(error)}).{more}"
            ) from error
    finally:
        handle.remove()
        timesteps, pipe.scheduler = pipe.scheduler.timesteps, scheduler
        pipe.set_progress_bar_config(**shown)
    if not calls:
        raise ValueError(f"a {name} did not call its network: its likelihood is not known here.")
    arguments = {key: value for key, value in calls[0].items() if key not in ("self", "kwargs")}
    arguments |= calls[0].get("kwargs", {})
    sample_name = next((n for n in _SAMPLES if n in arguments), None)
    time_name = next((n for n in _TIMES if n in arguments), None)
    if sample_name is None or time_name is None or not isinstance(arguments[sample_name], Tensor):
        raise ValueError(f"the network of a {name} takes no noisy sample and timestep that are known here.")
    sample, time = arguments.pop(sample_name), torch.as_tensor(arguments.pop(time_name))
    if len(sample) != 1:
        raise ValueError(f"a {name} evaluates its network {len(sample)} times a sample also without guidance.")
    scale = _time_scale(name, float(time.flatten()[0]), float(timesteps[0]))
    others = {key: value for key, value in arguments.items() if key not in _NOT_KEPT}
    dtype = time.dtype if time.is_floating_point() else None
    return _Call(sample_name, time_name, scale, dtype, others, tuple(sample.shape))


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _time_scale(name: str, seen: float, of_scheduler: float) -> float:
    """1 or 1/1000: what the network's timestep is, in the scheduler's."""
    for scale in (1.0, 1e-3):
        if abs(seen - scale * of_scheduler) <= 2e-3 * abs(seen) + 1e-9:
            return scale
    raise ValueError(
        f"a {name} tells its network {seen:g} at the timestep {of_scheduler:g}: its time runs in a way that is not "
        "known here."
    )


def _sorted_out(captured: Sequence[Mapping[str, Any]], name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Arguments with a row for each prompt, and those that all share."""
    flat = [_flattened(arguments) for arguments in captured]
    kept: dict[str, Tensor] = {}
    shared: dict[str, Any] = {}
    for key, first in flat[0].items():
        if isinstance(first, Tensor) and first.ndim and len(first) == 1:
            values = [one[key] for one in flat]
            if len({tuple(v.shape) for v in values}) > 1:
                raise ValueError(
                    f"the prompts come to {key} of different lengths in a {name}: evaluate them one by one."
                )
            kept[key] = torch.cat(values)
        else:
            shared[key] = first
    return kept, shared


def _flattened(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in arguments.items():
        if isinstance(value, dict):
            flat |= _flattened(value, f"{prefix}{key}{_NESTED}")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(_NESTED)
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return result


def _encode(pipe: Any, levels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The means of the autoencoder's latents in the network's units, packed as the pipeline packs them: float32 on
    the CPU.
    """
    name, vae = type(pipe).__name__, pipe.components.get("vae")
    if vae is None:  # a model of pixels
        return _of_shape(levels.float() / 127.5 - 1, shape, name)
    parameter = next(vae.parameters())
    parts = []
    for part in levels.split(_ENCODED):
        x = (part.float() / 127.5 - 1).to(parameter.device, parameter.dtype)
        try:
            encoded = vae.encode(x if len(shape) < 5 else x[:, :, None])
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(
                f"the `vae` of a {name} does not encode the images: {str(error).splitlines()[0]}"
            ) from error
        if hasattr(encoded, "latent_dist"):
            z = encoded.latent_dist.mode()
        elif hasattr(encoded, "latent"):
            z = encoded.latent
        else:
            raise ValueError(f"the `vae` of a {name}, a {type(vae).__name__}, has no Gaussian latents.")
        try:
            parts.append(_scaled(vae.config, z.float()).cpu())
        except RuntimeError as error:
            raise ValueError(f"the `vae` of a {name} scales its latents in a way that is not known here.") from error
    latents = torch.cat(parts)
    if latents.ndim == 4 and len(shape) == 3:
        if not hasattr(pipe, "_pack_latents"):
            raise ValueError(f"a {name} packs its latents in a way that is not known here.")
        latents = pipe._pack_latents(latents, *latents.shape)
    return _of_shape(latents, shape, name)


def _scaled(config: Any, z: Tensor) -> Tensor:
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and deviation is not None:
        rows = (1, -1, *[1] * (z.ndim - 2))
        return (z - torch.tensor(mean).reshape(rows).to(z)) / torch.tensor(deviation).reshape(rows).to(z)
    return (z - (config.get("shift_factor") or 0.0)) * (config.get("scaling_factor") or 1.0)


def _of_shape(latents: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    if tuple(latents.shape[1:]) != tuple(shape[1:]):
        raise ValueError(
            f"the images come to latents {tuple(latents.shape[1:])}, and a {name} gives its network "
            f"{tuple(shape[1:])}: its network takes more than "
            "noisy latents, or images of another size."
        )
    return latents
