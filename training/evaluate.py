#!/usr/bin/env python
"""Bits/dim of a trained model on held-out images: a table, JSON, the loss against log SNR, and a grid of samples.

    python training/evaluate.py --checkpoint outputs/digits
    python training/evaluate.py --checkpoint outputs/cifar10/checkpoint-50000 --split test --num_samples 64
    python training/evaluate.py --checkpoint google/ddpm-cifar10-32 --dataset_name uoft-cs/cifar10 --split test

The data are those that the model was trained on, as written beside it by train.py, unless --dataset_name or
--train_data_dir names others. The last line is the result: `held-out bits/dim: X +- Y`, where Y combines the error of
the estimate for these images with that of the sample of images.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -m`, runpy and -P leave the script's folder out

from arguments import DataArguments, EvaluateArguments, parse_evaluation, training_record

if __name__ == "__main__":
    parse_evaluation()  # --help and what cannot be are answered before the seconds that the imports below take

import dataclasses
import math
import os
import tempfile
import time
from typing import Any

import torch
from checkpoints import CheckpointError, write_json
from class_labels import labels_to_evaluate
from data import DataError, ImageSet, default_test_split, figure_name, load_split
from diffusers.utils import logging as diffusers_logging
from evaluating import (
    TERMS,
    analytic_bits_per_dim,
    bits_per_dim,
    combined_error,
    draw_samples,
    histogram_bits_per_dim,
    loss_by_log_snr,
)
from evaluation_report import extreme_images, markdown_block, plot_steps, plot_terms, plot_weights, write_per_image
from latent_models import LatentModel, latent_bits_per_dim, latent_pictures, latent_report, latent_samples
from overview import overview
from plots import image_grid, plot_loss_by_log_snr
from sample_quality import SampleQualityError, inception, sample_quality
from torch import Tensor

from vdm_diffusers import LatentVDMPipeline, VDMPipeline, compare_likelihood
from vdm_diffusers.hub import Provenance
from vdm_diffusers.loading import folder_name, is_on_hub, load_model
from vdm_diffusers.models.labels import is_class_conditional, num_classes


def table(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def evaluate(
    args: EvaluateArguments, data: DataArguments, *, fid_feature: torch.nn.Module | None = None
) -> dict[str, Any]:
    """Evaluate, write the results, and return what was written to evaluation.json.

    Arguments:
        fid_feature: with --fid, the network whose features are compared, (N, 3, H, W) uint8 -> (N, features); None:
            FID's Inception.
    """
    feature = None
    if args.fid:  # what is missing is said before anything is computed
        feature = inception(args.fid_weights) if fid_feature is None else fid_feature
    default = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    begun, lengths = time.time_ns(), chain_lengths(args)
    output_dir = results_folder(args)
    pipeline = load_model(args.checkpoint, args.device or default)
    record = training_record(args.checkpoint)
    data_seed = record["arguments"]["seed"] if record else 0
    split = args.split or default_test_split(data)
    images = load_split(data, split, data_seed)
    images = images if args.max_images is None else images.first(args.max_images)
    check_fit(pipeline, images)
    if not isinstance(pipeline, VDMPipeline):
        return evaluate_latent(args, data, pipeline, images, output_dir)
    print(f"evaluating {args.checkpoint} on {images.name}")

    chain = ancestral(pipeline)
    if chain is not pipeline and (lengths or args.method in ("discrete", "importance_weighted")):
        print(
            "bounds of a chain are those of ancestral sampling (stochasticity 1); samples are drawn with "
            "stochasticity "
            f"{pipeline.scheduler.config.stochasticity}"
        )
    result = bits_per_dim(
        chain,
        images,
        seed=args.seed,
        num_samples=args.num_samples,
        batch_size=args.batch_size,
        method=None if args.method == "auto" else args.method,
        num_steps=args.num_steps,
        options=likelihood_options(args),
        progress_bar=True,
    )
    error = combined_error([result["standard_error"], result["sampling_error"]])
    profile = loss_by_log_snr(pipeline, images, seed=args.seed, batch_size=args.batch_size, progress_bar=True)
    width = profile[0]["log_snr"] - profile[1]["log_snr"]
    result |= {
        "combined_error": error,
        "images": images.name,
        "split": split,
        "figure": figure_name(data, split, conditional=is_class_conditional(pipeline.unet)),
        "checkpoint": str(args.checkpoint),
        "fingerprint": images.fingerprint(),
        "provenance": dataclasses.asdict(Provenance.of_this_run(args.seed)),
        "num_samples": args.num_samples,
        "seed": args.seed,
        "num_levels": pipeline.config.num_levels,
        "pixel_encoding": pipeline.config.pixel_encoding,
        "log_snr_max": pipeline.scheduler.noise_schedule.log_snr_max,
        "log_snr_min": pipeline.scheduler.noise_schedule.log_snr_min,
        "diffusion_by_integral": sum(point["bits_per_dim_per_log_snr"] for point in profile) * width,
    }
    if args.baseline:
        train = load_split(data, data.train_split, data_seed)
        result["histogram_bits_per_dim"] = histogram_bits_per_dim(train, images)
        result["analytic_bits_per_dim"] = analytic_bits_per_dim(train, images, seed=args.seed)

    print(figure_line(result), flush=True)  # before anything is written, which may fail
    if args.against is not None:
        result["against"] = difference(args, pipeline, images)
        print(f"less that of {args.against}: {result['against']['text']}", flush=True)
    if lengths:
        result["steps_curve"] = steps_curve(chain, images, args, lengths)
        plot_steps(output_dir / "steps.png", result["steps_curve"])
    write_per_image(output_dir / "per_image.parquet", result, images)
    extreme_images(output_dir / "most_and_least_likely.png", result, images, pipeline.config.num_levels)
    plot_terms(output_dir / "terms.png", result, images.num_dims)
    plot_weights(output_dir / "loss_weights.png", profile)
    nats = result.pop("per_image")["nats"]  # in the parquet file
    quality = None
    if feature is not None:
        number = min(args.fid_num_images, len(images))
        generated = draw_samples(
            pipeline,
            number,
            seed=args.seed,
            num_inference_steps=args.num_inference_steps,
            batch_size=args.batch_size,
            num_classes=num_classes(pipeline.unet) if is_class_conditional(pipeline.unet) else None,
        )
        options = {"feature": feature, "seed": args.seed, "batch_size": args.batch_size, "device": pipeline.device}
        quality = sample_quality(images.images[:number], generated, pipeline.config.num_levels, **options)
        result |= {"sample_quality": dataclasses.asdict(quality)}
    (output_dir / "model_card_block.md").write_text(markdown_block(result), encoding="utf-8")
    write_json(output_dir / "evaluation.json", result | {"loss_by_log_snr": profile})
    title = f"{result['bits_per_dim']:.3f} ± {error:.3f} bits/dim"
    plot_loss_by_log_snr(profile, output_dir / "loss_by_log_snr.png", title=title, label=split)
    if args.num_sample_images:
        levels = draw_samples(
            pipeline,
            args.num_sample_images,
            seed=args.seed,
            num_inference_steps=args.num_inference_steps,
            batch_size=args.batch_size,
            num_classes=num_classes(pipeline.unet) if is_class_conditional(pipeline.unet) else None,
        )
        image_grid(levels, pipeline.config.num_levels).save(output_dir / "samples.png")
        picture: dict[str, Any] = {
            "title": f"{args.checkpoint}: {title} on {result['num_images']} held-out images",
            "seed": args.seed,
        }
        overview(output_dir / "overview.png", pipeline, images, nats, profile, levels, **picture)

    rows = [(term, f"{result[term]:.4f} bits/dim") for term in TERMS if term in result]
    rows += [
        ("sum", f"{result['bits_per_dim']:.4f} bits/dim{', an upper bound' if result['is_bound'] else ''}"),
        ("error of the estimate for these images", f"{result['standard_error']:.4f}"),
        (
            f"error of a sample of {result['num_images']} images",
            "-" if math.isnan(result["sampling_error"]) else f"{result['sampling_error']:.4f}",
        ),
        ("method", f"{result['method']} time, {result['num_model_evaluations']} network evaluations"),
    ]
    if quality is not None:
        what = f"{quality.num_images} samples in {args.num_inference_steps} steps"
        rows.append((f"FID of {what}", f"{quality.fid:.3f}"))
        rows.append((f"KID of {what}", f"{quality.kid:.5f} (deviation over subsets {quality.kid_deviation:.5f})"))
    if args.baseline:
        rows.append(
            ("for comparison: one histogram for each pixel", f"{result['histogram_bits_per_dim']:.4f} bits/dim")
        )
        number = min(256, result["num_images"])
        for name, words in (
            ("wiener", f"Wiener's filter, no weights, {number} images"),
            ("wiener_and_levels", "and the pixels' levels"),
        ):
            one = result["analytic_bits_per_dim"][name]
            rows.append(
                (f"for comparison: {words}", f"{one['bits_per_dim']:.4f} +- {one['standard_error']:.4f} bits/dim")
            )
    print(table(rows))
    print(f"wrote {', '.join(written_since(output_dir, begun))} to {output_dir}")
    return result


def difference(args: EvaluateArguments, pipeline: VDMPipeline, images: ImageSet) -> dict[str, Any]:
    """The figure less that of --against, from shared noise (`compare_likelihood`)."""
    assert args.against is not None
    other = load_model(args.against, pipeline.device)
    sides: list[dict[str, Any]] = []
    for model in (pipeline, other):
        labels = labels_to_evaluate(model.unet, images) if isinstance(model, VDMPipeline) else None
        sides.append({} if labels is None else {"class_labels": labels})
    report = compare_likelihood(
        pipeline,
        other,
        images.images,
        a_options=sides[0],
        b_options=sides[1],
        method=None if args.method == "auto" else args.method,
        num_samples=args.num_samples,
        batch_size=args.batch_size,
        generator=args.seed,
        target_standard_error=args.target_standard_error,
    )
    return report.to_dict() | {"checkpoint": args.against, "text": str(report)}


def results_folder(args: EvaluateArguments) -> Path:
    """Where the results go, made and tried before any work: beside a local checkpoint, in evaluation/owner--name for
    one of the Hub.

    Raises:
        CheckpointError: nothing can be written there; or no such checkpoint.
    """
    on_hub = is_on_hub(args.checkpoint)
    default = Path("evaluation", folder_name(args.checkpoint)) if on_hub else Path(args.checkpoint) / "evaluation"
    output_dir = Path(args.output_dir or default).expanduser()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise CheckpointError(
            f"nothing can be written to {output_dir} ({error.strerror}): choose another --output_dir."
        ) from None
    return output_dir


def written_since(folder: Path, begun: int) -> list[str]:
    """The names of the files that this run wrote there; those of an earlier one may lie beside them."""
    return sorted(
        path.name for path in folder.iterdir() if path.is_file() and path.stat().st_mtime_ns >= begun - 10**9
    )


def figure_line(result: dict[str, Any]) -> str:
    """The figure in one line, which says of which images it is."""
    return f"{result['figure']}: {result['bits_per_dim']:.3f} +- {result['combined_error']:.3f}"


def evaluate_latent(
    args: EvaluateArguments, data: DataArguments, model: LatentModel, images: ImageSet, output_dir: Path
) -> dict[str, Any]:
    """`evaluate` for a model with a learned encoder: the same report, and for a VAE the bound of --num_samples
    samples.

    Raises:
        ValueError: for what only diffusion models have.
    """
    begun = time.time_ns()
    wanted = {
        "--against": args.against,
        "--method": args.method != "auto",
        "--steps_curve": args.steps_curve,
        "--fid": args.fid,
    }
    wanted |= likelihood_options(args)
    refused = [name for name, value in wanted.items() if value]
    if refused:
        raise ValueError(f"{', '.join(refused)}: for diffusion models; this is a {type(model).__name__}.")
    common: dict[str, Any] = {"seed": args.seed, "batch_size": args.batch_size}
    result = latent_bits_per_dim(model, images, num_samples=args.num_samples, **common)
    error = combined_error([result["standard_error"], result["sampling_error"]])
    result |= {
        "combined_error": error,
        "images": images.name,
        "split": args.split or default_test_split(data),
        "figure": figure_name(data, args.split or default_test_split(data)),
        "checkpoint": str(args.checkpoint),
        "fingerprint": images.fingerprint(),
        "provenance": dataclasses.asdict(Provenance.of_this_run(args.seed)),
        "num_samples": args.num_samples,
        "seed": args.seed,
        "num_levels": model.config.num_levels,
        "pixel_encoding": model.config.pixel_encoding,
    }
    rows = [(term, f"{result[term]:.4f} bits/dim") for term in TERMS]
    rows += [
        ("sum", f"{result['bits_per_dim']:.4f} bits/dim, an upper bound"),
        ("error of the estimate for these images", f"{result['standard_error']:.4f}"),
        (
            f"error of a sample of {result['num_images']} images",
            "-" if math.isnan(result["sampling_error"]) else f"{result['sampling_error']:.4f}",
        ),
    ]
    if not isinstance(model, LatentVDMPipeline):
        tighter = latent_report(model, images.images, num_samples=2, importance_samples=args.num_samples, **common)
        result["importance_weighted"] = {
            "bits_per_dim": tighter.bits_per_dim,
            "standard_error": tighter.standard_error,
        }
        rows.append((f"bound of {args.num_samples} samples", f"{tighter.bits_per_dim:.4f} bits/dim"))
    if args.baseline:
        seed = (training_record(args.checkpoint) or {"arguments": {"seed": 0}})["arguments"]["seed"]
        result["histogram_bits_per_dim"] = histogram_bits_per_dim(load_split(data, data.train_split, seed), images)
        rows.append(
            ("for comparison: one histogram for each pixel", f"{result['histogram_bits_per_dim']:.4f} bits/dim")
        )
    print(figure_line(result), flush=True)
    write_per_image(output_dir / "per_image.parquet", result, images)
    extreme_images(output_dir / "most_and_least_likely.png", result, images, model.config.num_levels)
    plot_terms(output_dir / "terms.png", result, images.num_dims)
    del result["per_image"]  # it is in the parquet file
    (output_dir / "model_card_block.md").write_text(markdown_block(result), encoding="utf-8")
    write_json(output_dir / "evaluation.json", result)
    pictures: dict[str, tuple[Tensor, int | None]] = {**latent_pictures(model, images.images, seed=args.seed)}
    if args.num_sample_images:
        steps = args.num_inference_steps
        pictures["samples"] = (
            latent_samples(model, args.num_sample_images, num_inference_steps=steps, **common),
            None,
        )
    for name, (levels, columns) in pictures.items():
        image_grid(levels, model.config.num_levels, columns=columns).save(output_dir / f"{name}.png")
    print(table(rows))
    print(f"wrote {', '.join(written_since(output_dir, begun))} to {output_dir}")
    return result


def likelihood_options(args: EvaluateArguments) -> dict[str, Any]:
    """The further arguments of evaluate_likelihood that were given."""
    options: dict[str, Any] = {
        "grid": None if args.grid == "auto" else args.grid,
        "variance_type": args.variance_type,
        "target_standard_error": args.target_standard_error,
        "max_model_evaluations": args.max_model_evaluations,
        "resume_dir": args.resume_dir,
    }
    return {name: value for name, value in options.items() if value is not None}


def chain_lengths(args: EvaluateArguments) -> list[int]:
    """The numbers of --steps_curve, ascending.

    Raises:
        ValueError: for what is not a positive integer.
    """
    numbers = [number.strip() for number in (args.steps_curve or "").split(",") if number.strip()]
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise ValueError(
            f"--steps_curve takes numbers of steps with commas between them, e.g. 10,25,100; got {args.steps_curve!r}."
        )
    return sorted(int(number) for number in numbers)


def ancestral(pipeline: VDMPipeline) -> VDMPipeline:
    """The same network with the chain of ancestral sampling, whose bound is meant where the sampler adds more or less
    noise.

    A deterministic sampler has no finite bound and is left as it is: evaluate_likelihood refuses it.
    """
    config = pipeline.scheduler.config
    if config.stochasticity in (0, 1):
        return pipeline
    scheduler = type(pipeline.scheduler).from_config(config, stochasticity=1.0)
    levels = {name: pipeline.config[name] for name in ("num_levels", "pixel_encoding")}
    return VDMPipeline(pipeline.unet, scheduler, **levels)


def steps_curve(
    pipeline: VDMPipeline, images: ImageSet, args: EvaluateArguments, lengths: list[int]
) -> list[dict[str, Any]]:
    """Bits/dim of chains of several lengths, each step evaluated once or twice for every image."""
    rows = []
    for steps in lengths:
        options = {
            name: value for name, value in likelihood_options(args).items() if name in ("grid", "variance_type")
        }
        result = bits_per_dim(
            pipeline,
            images,
            seed=args.seed,
            num_samples=max(2 * steps, 16) if steps <= 100 else min(steps, 100),
            batch_size=args.batch_size,
            method="discrete",
            num_steps=steps,
            options=options,
            progress_bar=True,
        )
        rows.append({"num_steps": steps} | {name: result[name] for name in ("bits_per_dim", "standard_error")})
    return rows


def check_fit(pipeline: VDMPipeline | LatentModel, images: ImageSet) -> None:
    """Raise DataError if the model is of other images."""
    channels, height, width = images.images.shape[1:]
    if isinstance(pipeline, VDMPipeline):
        network = pipeline.unet.config
    else:
        network = pipeline.vae.config if isinstance(pipeline, LatentVDMPipeline) else pipeline.config
    size = network.get("sample_size")
    size = (size, size) if isinstance(size, int) else tuple(size or (height, width))
    if (network.in_channels, *size) != (channels, height, width):
        raise DataError(
            f"the model is of images of {network.in_channels} channel(s), {size[0]}x{size[1]}; these have {channels}, "
            f"{height}x{width}. Name the right data with --dataset_name (and --resolution, --image_mode)."
        )
    if int(images.images.max()) >= pipeline.config.num_levels:
        raise DataError(
            f"the model is of {pipeline.config.num_levels} levels; these images hold level {int(images.images.max())}."
        )


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    args, data = parse_evaluation(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        print(
            "evaluate.py: error: it runs in one process: start it with python, not with a launcher.", file=sys.stderr
        )
        return 2
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    try:
        result = evaluate(args, data)
    except (DataError, CheckpointError, SampleQualityError, ValueError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2
    print(figure_line(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
