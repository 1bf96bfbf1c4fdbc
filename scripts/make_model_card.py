#!/usr/bin/env python
"""Make a folder of `model_cards/` from a finished run of train.py and its evaluation by evaluate.py.

    python training/train.py --output_dir outputs/digits
    python training/evaluate.py --checkpoint outputs/digits
    python scripts/make_model_card.py --run outputs/digits --card model_cards/digits-elbo --title digits-elbo

Takes the pipeline, the sample grid and the loss by log SNR, and draws the course of the training; the card's figures
are those of evaluation.json, with their provenance.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
from plots import plot_training

from vdm_diffusers.hub import EvaluationData, Measurement, ModelDescription, Provenance, write_model_card

PROVENANCE = ("command", "seed", "versions", "machine", "date")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="--output_dir of train.py")
    parser.add_argument("--card", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--title", required=True)
    parser.add_argument("--license", default="apache-2.0")
    parser.add_argument("--limitation", action="append", default=[], help="a sentence for the card; may be repeated")
    args = parser.parse_args()
    evaluation_file = args.run / "evaluation" / "evaluation.json"
    if args.card.exists():
        print(f"error: {args.card} exists: remove it first.", file=sys.stderr)
        return 2
    if not evaluation_file.is_file():
        print(
            f"error: {evaluation_file} is missing: run training/evaluate.py --checkpoint {args.run}.", file=sys.stderr
        )
        return 2
    evaluation = json.loads(evaluation_file.read_text(encoding="utf-8"))
    training = json.loads((args.run / "training_arguments.json").read_text(encoding="utf-8"))
    own_card = ModelCard.load(args.run / "README.md")

    args.card.mkdir(parents=True)
    for name in ("unet", "scheduler"):
        shutil.copytree(args.run / name, args.card / name)
    shutil.copyfile(args.run / "model_index.json", args.card / "model_index.json")
    shutil.copyfile(args.run / "samples.png", args.card / "samples.png")
    shutil.copyfile(args.run / "evaluation" / "loss_by_log_snr.png", args.card / "loss_by_log_snr.png")
    with (args.run / "metrics.jsonl").open(encoding="utf-8") as lines:
        entries = [json.loads(line) for line in lines]
    plot_training(
        entries,
        args.card / "training.png",
        title=f"{args.title}: {training['num_parameters'] / 1e6:.2f}M weights",
        weighs_by_elbo=training["arguments"]["loss"] == "elbo",
    )
    write_model_card(args.card, describe(args, evaluation, training, own_card))
    print(f"wrote {args.card}")
    return 0


def describe(
    args: argparse.Namespace, evaluation: dict[str, Any], training: dict[str, Any], own_card: ModelCard
) -> ModelDescription:
    """The card's content: the test figure from the evaluation, the training from the run's own card."""
    own = own_card.data.eval_results[0].metric_args
    arguments = training["arguments"]
    duration = re.search(r"\| time \| (.+?) \|", own_card.text)
    if duration is None:
        raise ValueError(f"the card in {args.run} does not say how long the training took.")
    measurement = Measurement(
        **{name: evaluation[name] for name in ("bits_per_dim", "standard_error", "sampling_error", "is_bound")},
        **{name: evaluation[name] for name in ("log_snr_max", "log_snr_min", "num_model_evaluations")},
        **{name: evaluation.get(name) for name in ("prior", "diffusion", "reconstruction")},
        method=f"ELBO in {evaluation['method']} time",
        num_steps=evaluation["settings"]["num_steps"],
        data=EvaluationData(
            name=own_card.data.eval_results[0].dataset_name,
            identifier=own_card.data.eval_results[0].dataset_type,
            version=f"blake2b {evaluation['fingerprint']}",
            split=evaluation["split"],
            num_images=evaluation["num_images"],
        ),
        provenance=Provenance(**evaluation["provenance"]),
    )
    steps, baseline = arguments["ddpm_num_inference_steps"], evaluation.get("histogram_bits_per_dim")
    summary = f"A variational diffusion model of {training['train_images']}, {training['num_levels']} levels."
    if baseline is not None:
        summary += f" Independent pixels with a histogram each need {baseline:.3f} bits/dim on the same images."
    return ModelDescription(
        title=args.title,
        summary=summary,
        license=args.license,
        training=(
            f"{training['max_train_steps']} optimiser steps of {training['global_batch']} images, loss "
            f"{arguments['loss']}, "
            f"optimiser {arguments['optimizer']}, schedule {arguments['ddpm_beta_schedule']}, "
            f"{training['num_parameters'] / 1e6:.2f}M weights, averaged."
        ),
        training_data=[],
        provenance=Provenance(**{name: own[name] for name in PROVENANCE}),
        duration=duration.group(1),
        measurements=[measurement],
        limitations=[
            f"It knows {training['train_images']} and nothing else; it is an example of the method.",
            *args.limitation,
        ],
        location=str(args.card),
        images={
            "samples.png": f"Samples, drawn in {steps} steps, not selected.",
            "training.png": "The course of the training, on images held out of the training split.",
            "loss_by_log_snr.png": "Bits/dim per unit of log SNR on the test images: the area is the diffusion term.",
        },
        num_inference_steps=steps,
    )


if __name__ == "__main__":
    sys.exit(main())
