"""What a model card states: figures, each with its error bars, its data and its provenance."""

from __future__ import annotations

import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata

import torch

# of users, of organisations, and those that the Hub gives to apps and jobs
TOKEN = re.compile(r"\b(?:hf_(?:oauth_|jwt_)|api_org_|hf_)[A-Za-z0-9][\w.-]{15,}")


@dataclass(frozen=True)
class Provenance:
    """How a number or a file came about: enough to make it again. Every field is required, and none may be empty.

    Arguments:
        command: as typed; tokens in it are blotted out. seed: of the run.
        versions: of python and the packages that matter. machine: what it ran on. date: ISO 8601, UTC.
    """

    command: str
    seed: int
    versions: Mapping[str, str]
    machine: str
    date: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "command", redact(self.command))
        _require_text(self, "command", "machine", "date")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"`seed` must be a whole number, got {self.seed!r}.")
        missing = {"vdm-diffusers", "torch", "diffusers"} - set(self.versions)
        if missing:
            raise ValueError(f"`versions` must name {', '.join(sorted(missing))} too.")

    @classmethod
    def of_this_run(cls, seed: int, command: str | None = None) -> Provenance:
        """This process, now: `command` None stands for what it was started with."""
        packages = ("vdm-diffusers", "torch", "diffusers", "numpy")
        accelerators = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return cls(
            command=command or shlex.join(["python", *map(_without_place, sys.argv)]),
            seed=seed,
            versions={"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
            machine=", ".join([f"{os.cpu_count()} CPU cores ({platform.machine()})", *sorted(accelerators)]),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )


def _without_place(argument: str) -> str:
    """A command's argument for other machines: a path below this folder from here on, another one of the whole disk
    by its last part.
    """
    if not os.path.isabs(argument):
        return argument
    below = os.path.relpath(argument)
    return os.path.basename(argument.rstrip(os.sep)) if below.startswith(os.pardir) else below


@dataclass(frozen=True)
class EvaluationData:
    """The data of a figure: name for people, identifier (a Hub dataset, or what provides it), version, split, images
    used.
    """

    name: str
    identifier: str
    version: str
    split: str
    num_images: int
    config: str | None = None

    def __post_init__(self) -> None:
        _require_text(self, "name", "identifier", "version", "split")
        if self.num_images < 1:
            raise ValueError(f"`num_images` must be at least 1, got {self.num_images}.")


@dataclass(frozen=True)
class Measurement:
    """Bits/dim, and all that one must know to believe it. Every field without a default is required.

    Arguments:
        bits_per_dim: mean over the images.
        standard_error: of the estimator, for these images. sampling_error: between images, std / sqrt(N); None for one
            image.
        method: for people, such as "ELBO in continuous time". is_bound: an upper bound, or the likelihood itself.
        num_steps: of the discrete chain or the solver; None in continuous time.
        log_snr_max, log_snr_min: the end points of the schedule; None for a model without one.
        num_model_evaluations: in all, or for each image, as the evaluator counts.
        data, provenance: what was measured, and how.
        prior, diffusion, reconstruction: the terms of the bound in bits/dim, None where the method has none.
    """

    bits_per_dim: float
    standard_error: float
    sampling_error: float | None
    method: str
    is_bound: bool
    num_steps: int | None
    log_snr_max: float | None
    log_snr_min: float | None
    num_model_evaluations: int
    data: EvaluationData
    provenance: Provenance
    prior: float | None = None
    diffusion: float | None = None
    reconstruction: float | None = None

    def __post_init__(self) -> None:
        _require_text(self, "method")
        one_image = isinstance(self.data, EvaluationData) and self.data.num_images == 1
        for name in ("bits_per_dim", "standard_error", "sampling_error", "log_snr_max", "log_snr_min"):
            value = getattr(self, name)
            if value is None and name.startswith("log_snr") and self.log_snr_max is self.log_snr_min:
                continue
            if name == "sampling_error" and value is None and one_image:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"`{name}` must be a finite number, got {value!r}.")
        if min(self.standard_error, self.sampling_error or 0) < 0:
            raise ValueError(
                f"`standard_error` and `sampling_error` must not be negative, got {self.standard_error} and "
                f"{self.sampling_error}."
            )
        for name, kind in (("data", EvaluationData), ("provenance", Provenance)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"`{name}` must be {kind.__name__}, got {getattr(self, name)!r}: no figure without it."
                )

    @property
    def error(self) -> float:
        """Both errors combined."""
        return math.hypot(self.standard_error, self.sampling_error or 0)


@dataclass(frozen=True)
class ModelDescription:
    """What a model card says.

    Arguments:
        title: of the card. summary: a sentence or two. license: SPDX identifier in the Hub's spelling, such as
            "apache-2.0".
        training: how it was trained, in prose; training_data: identifiers. provenance: of the weights. duration: of
            the training.
        measurements: the figures. limitations: at least one.
        location: what `from_pretrained` is given; see `model_location`.
        images: file in the folder -> caption: the sample grid, curves.
        num_inference_steps: for the examples.
    """

    title: str
    summary: str
    license: str
    training: str
    training_data: Sequence[str]
    provenance: Provenance
    duration: str
    measurements: Sequence[Measurement]
    limitations: Sequence[str]
    location: str
    images: Mapping[str, str] = field(default_factory=dict)
    num_inference_steps: int = 250
    tags: Sequence[str] = ()

    def __post_init__(self) -> None:
        _require_text(self, "title", "summary", "license", "training", "duration", "location")
        if not isinstance(self.provenance, Provenance):
            raise ValueError(f"`provenance` must be a Provenance, got {self.provenance!r}.")
        if not all(isinstance(m, Measurement) for m in self.measurements):
            raise ValueError("`measurements` must be Measurements: a bare number has no provenance.")
        if not self.limitations:
            raise ValueError("`limitations` must name at least one: every model has them.")


def redact(text: str) -> str:
    """`text` without access tokens: whatever looks like one, and whatever follows an option such as --hub_token."""
    text = re.sub(r"(--?\w*token)(=|\s+)(?!-)(\S+)", r"\1\2***", text)
    return TOKEN.sub("***", text)


def _require_text(record: object, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"`{name}` of {type(record).__name__} must be text, got {value!r}.")
