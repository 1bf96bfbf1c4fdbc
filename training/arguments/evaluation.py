"""The command line of `evaluate.py`: what to evaluate, how, on which images."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .command_line import ARGUMENTS_FILE
from .fields import Bounds, argument, check_values
from .groups import DataArguments
from .parser import Parser


@dataclass
class EvaluateArguments:
    """What to evaluate, how, and where results go."""

    _argument_group_name = "evaluation"

    checkpoint: str = argument(
        "outputs/digits",
        "Folder that train.py wrote (also a checkpoint-N in it; of any --model), or a pipeline on the Hub with unet "
        "and "
        "scheduler.",
        basic=True,
        path=True,
    )
    split: str | None = argument(
        None,
        "Split to evaluate; none: the data set's own test split if it has one, else the images held out while "
        "training. "
        "'held_out' names the latter.",
        basic=True,
    )
    max_images: int | None = argument(
        None, "Evaluate the first so many images; none: all.", bounds=Bounds(1), basic=True
    )
    against: str | None = argument(
        None,
        "Another model, as --checkpoint: also the difference of the two, from shared noise, with a far smaller "
        "error than two figures have.",
        path=True,
        basic=True,
    )
    method: Literal["auto", "continuous", "discrete", "importance_weighted", "ode"] = argument(
        "auto",
        "ELBO in continuous time, or of a chain of --num_steps steps, its K-sample bound, or the probability-flow "
        "ODE; auto: "
        "by the schedule's kind.",
        basic=True,
    )
    num_steps: int | None = argument(
        None, "Steps of the chain for the discrete method; none: as trained.", bounds=Bounds(1, 100_000)
    )
    grid: Literal["auto", "time", "log_snr", "optimal"] = argument(
        "auto", "Where these steps are; optimal needs the scheduler's optimal_variance."
    )
    variance_type: str | None = argument(None, "Reverse variance of the chain instead of the scheduler's.")
    target_standard_error: float | None = argument(
        None,
        "Go on beyond --num_samples until the estimate's error is this small, in bits/dim.",
        bounds=Bounds(0, open_low=True),
    )
    max_model_evaluations: int | None = argument(
        None, "Stop there whether or not the target is reached.", bounds=Bounds(1)
    )
    resume_dir: str | None = argument(
        None, "Folder for partial results: an evaluation that is cut off goes on from there.", path=True
    )
    steps_curve: str | None = argument(
        None,
        "Also plot bits/dim against these numbers of steps, such as 10,25,100,250: as many evaluations an image each.",
    )
    num_samples: int = argument(
        16,
        "Network evaluations for each image, stratified over time; the error bar needs two.",
        bounds=Bounds(2, 2**24),
        basic=True,
    )
    batch_size: int = argument(64, "Images at a time.", bounds=Bounds(1, 2**24), basic=True)
    seed: int = argument(0, "Seed of times, noise and samples.", bounds=Bounds(0, 2**32 - 1), basic=True)
    num_sample_images: int = argument(
        100, "Images in the grid of samples; 0: none.", bounds=Bounds(0, 2**16), basic=True
    )
    num_inference_steps: int = argument(250, "Sampler steps for them.", bounds=Bounds(1, 100_000), basic=True)
    fid: bool = argument(
        False, "Also FID and KID of samples against the evaluated images, with torchmetrics and Inception's weights."
    )
    fid_num_images: int = argument(
        10000, "Images and samples for them, at most; the split may have fewer.", bounds=Bounds(2)
    )
    fid_weights: str | None = argument(
        None, "File of Inception's weights; none: where torch.hub keeps checkpoints.", path=True
    )
    baseline: bool = argument(
        True, "Also print the bits/dim of independent histograms of the training images' pixels."
    )
    output_dir: str | None = argument(
        None,
        "Folder for the results; none: `evaluation` in the checkpoint's folder, or evaluation/owner--name for one "
        "of the Hub.",
        basic=True,
        path=True,
    )
    device: str | None = argument(None, "Device; none: an accelerator if there is one.", basic=True)


def parse_evaluation(argv: Sequence[str] | None = None) -> tuple[EvaluateArguments, DataArguments]:
    """The arguments; data arguments that are not given are those of the training run."""
    parser = Parser(
        (EvaluateArguments, DataArguments),
        usage="%(prog)s --checkpoint FOLDER [--argument VALUE ...]",
        description="Bits/dim of a trained model on images that it was not trained on.",
    )
    tokens = sys.argv[1:] if argv is None else list(argv)
    parser.answer_help(tokens)
    given = parser.read(tokens)
    of_evaluation, of_data = (
        {f.name: given[f.name] for f in dataclasses.fields(kind) if f.name in given}
        for kind in (EvaluateArguments, DataArguments)
    )
    args, data = EvaluateArguments(**of_evaluation), DataArguments(**of_data)
    try:
        check_values(args)
        check_values(data)
    except ValueError as error:
        parser.error(str(error))
    if data.dataset_name is None and data.train_data_dir is None:
        trained = training_record(args.checkpoint)
        if trained is not None:
            names = {f.name for f in dataclasses.fields(DataArguments)} & set(trained["arguments"])
            data = DataArguments(**{name: trained["arguments"][name] for name in names} | of_data)
    return args, data


def training_record(checkpoint: str) -> dict[str, Any] | None:
    """What train.py wrote beside the model, if it is a local folder that has it."""
    path = Path(checkpoint) / ARGUMENTS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
