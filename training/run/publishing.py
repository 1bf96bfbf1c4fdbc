"""The model card, and the Hub."""

from __future__ import annotations

import shlex
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints import (
    SaveError,
    without_nan,
)
from data import (
    evaluation_split,
    is_digits,
)
from diffusion import schedule_name
from evaluating import TERMS

from vdm_diffusers.hub import (
    HUB_ERRORS,
    EvaluationData,
    Measurement,
    ModelDescription,
    Provenance,
    publish_folder,
    write_model_card,
)

from .constants import (
    MODEL_NAMES,
    PICTURES,
    SAMPLES_FILE,
)
from .launch import (
    one_line,
)

if TYPE_CHECKING:
    from train import Training


def publish(training: Training) -> None:
    """The model card in --output_dir, and with --push_to_hub the model, its card and its pictures on the Hub."""
    if training.accelerator.is_main_process:
        images = {}
        for name, picture in training.last_samples.items():
            shutil.copyfile(picture, training.output_dir / name)
            images[name] = PICTURES[name].format(steps=training.args.diffusion.ddpm_num_inference_steps)
        if training.args.model.model in ("vae", "hvae") and training.last_samples:
            images[SAMPLES_FILE] = "Samples, not selected."
        write_model_card(training.output_dir, _model_description(training, images))
        if training.repo_id is not None:
            run = training.args.run
            # through the queue of the checkpoints' pushes, so that none of them overtakes it
            push = publish_folder(
                training.output_dir,
                training.repo_id,
                private=run.hub_private_repo or None,
                token=run.hub_token,
                run_as_future=True,
            )
            assert isinstance(push, Future)
            try:
                push.result()
            except HUB_ERRORS as error:
                again = (
                    "from vdm_diffusers.hub import publish_folder; "
                    f"publish_folder({str(training.output_dir)!r}, {training.repo_id!r})"
                )
                raise SaveError(
                    f"the model lies in {training.output_dir}, and was not pushed to {training.repo_id}: "
                    f"{one_line(error)} To push it again: "
                    f"python -c {shlex.quote(again)}"
                ) from error
            training.accelerator.print(f"published {training.repo_id}")
    training.accelerator.wait_for_everyone()


def push_in_background(training: Training, folder: Path, message: str) -> None:
    """Queue the model in `folder` for the Hub.

    A push that fails is reported, and costs the run nothing but that push.
    """

    def report(push: Future[Any]) -> None:
        if push.exception() is not None:
            training.accelerator.print(f"warning: {message} was not pushed to {training.repo_id}: {push.exception()}")

    run = training.args.run
    try:
        push = publish_folder(
            folder,
            str(training.repo_id),
            private=run.hub_private_repo or None,
            commit_message=message,
            token=run.hub_token,
            run_as_future=True,
        )
    except OSError as error:  # no room for the copy that is pushed
        training.accelerator.print(f"warning: {message} was not pushed to {training.repo_id}: {error}")
        return
    assert isinstance(push, Future)
    push.add_done_callback(report)


def _model_description(training: Training, images: dict[str, str]) -> ModelDescription:
    """What the model card says: what was trained on what, and the last evaluation."""
    args, seed = training.args, training.args.optimization.seed
    provenance, kind = Provenance.of_this_run(seed), args.model.model
    schedule = None if kind in ("vae", "hvae") else training.time.scheduler().noise_schedule
    identifier = "sklearn.datasets.load_digits" if is_digits(args.data) else training.train_images.source
    on_hub = args.data.dataset_name is not None and not Path(args.data.dataset_name).exists()
    measurements = []
    if training.last_evaluation is not None:
        result = training.last_evaluation
        terms: dict[str, Any] = {term: result.get(term) for term in TERMS}
        data = EvaluationData(
            name=training.eval_images.source,
            identifier=identifier,
            version=f"blake2b {training.eval_images.fingerprint()}",
            split=evaluation_split(args.data),
            num_images=result["num_images"],
            config=args.data.dataset_config_name,
        )
        measurements.append(
            Measurement(
                **without_nan(
                    {name: result[name] for name in ("bits_per_dim", "standard_error", "sampling_error", "is_bound")}
                ),
                method="ELBO" if training.is_latent else f"ELBO in {result['method']} time",
                num_steps=args.diffusion.ddpm_num_steps if result["method"] == "discrete" else None,
                log_snr_max=None if schedule is None else schedule.log_snr_max,
                log_snr_min=None if schedule is None else schedule.log_snr_min,
                num_model_evaluations=result["num_model_evaluations"],
                data=data,
                provenance=provenance,
                **terms,
            )
        )
    channels, height, width = training.train_images.images.shape[1:]
    parameters = sum(p.numel() for p in training.network.parameters())
    loss = "the bound" if schedule is None else f"{args.diffusion.loss}, schedule {schedule_name(args.diffusion)}"
    return ModelDescription(
        title=(training.repo_id or training.output_dir.resolve().name).split("/")[-1],
        summary=(
            f"A {MODEL_NAMES[kind]} of images of {height}x{width} pixels, {channels} channel(s), "
            f"{training.num_levels} levels."
        ),
        license=args.run.hub_license,
        training=(
            f"Trained on {training.train_images.name}: {training.step} optimiser steps of {training.global_batch} "
            f"images, loss {loss}, {parameters / 1e6:.2f}M weights{', averaged' if training.ema else ''}."
        ),
        training_data=[identifier] if on_hub else [],
        provenance=provenance,
        duration=f"{training.seconds() / 60:.1f} minutes, evaluations included",
        measurements=measurements,
        limitations=[
            f"It knows the kind of images it was trained on, at {height}x{width} pixels; nothing else was examined."
        ],
        location=training.repo_id or str(training.output_dir),
        images=images,
        num_inference_steps=args.diffusion.ddpm_num_inference_steps,
    )
