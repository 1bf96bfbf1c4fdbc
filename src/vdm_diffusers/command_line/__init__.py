"""`vdm-diffusers` on the command line: for people who installed the package and have no checkout.

    vdm-diffusers evaluate CHECKPOINT IMAGES          bits/dim with its error
    vdm-diffusers compare A B IMAGES                  which of two models, and by how much
    vdm-diffusers classify CHECKPOINT IMAGES          which class each image is of
    vdm-diffusers score CHECKPOINT IMAGES TABLE       a row for each image: bits, error, terms, octaves, odds of its
    label vdm-diffusers sample CHECKPOINT PICTURE           a grid of samples

CHECKPOINT is a folder or a repository of the Hub. IMAGES is a folder of image files (subfolders are classes), an array
`.npy` or `.npz`, a data set that `datasets` reads, or `digits`. Exit codes: 0 done; 2 bad arguments, models or images;
130 interrupted; 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "vdm-diffusers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, *checkpoints: str, images: bool = True) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        for checkpoint in checkpoints:
            one.add_argument(checkpoint, help="folder or Hub repository of a checkpoint")
        if images:
            one.add_argument("images", help="folder of image files, .npy, .npz, a data set, or 'digits'")
            one.add_argument("--split", default="test", help="of a data set (default: %(default)s)")
            one.add_argument("--label_column", help="of a data set; default: its only column of class labels")
            one.add_argument("--max_images", type=_positive, help="the first so many; default: all")
        one.add_argument("--batch_size", type=_positive, help="evaluations at a time; does not change the result")
        one.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
        one.add_argument("--device", help="cpu, cuda, mps; default: a GPU if there is one")
        one.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
        one.add_argument("--quiet", action="store_true", help="no progress bar")
        return one

    for name, text, checkpoints in (
        ("evaluate", "Bits/dim of images under a model, with the error of the estimate.", ("checkpoint",)),
        ("compare", "The difference of two models' bits/dim, a - b, from shared noise.", ("a", "b")),
    ):
        one = command(name, text, *checkpoints)
        one.add_argument(
            "--num_samples", type=_positive, default=16, help="evaluations an image (default: %(default)s)"
        )
        one.add_argument(
            "--method",
            choices=("continuous", "discrete", "importance_weighted", "ode")[: 2 if name == "compare" else 4],
        )
        one.add_argument("--num_steps", type=_positive, help="of the chain of the discrete methods")
        one.add_argument(
            "--target_standard_error", type=float, help="go on until the error is this small, in bits/dim"
        )
        one.add_argument("--class_label", type=int, help="for all images, instead of their own labels")
    one = command("classify", "The posterior probability of each class for each image.", "checkpoint")
    one.add_argument("--num_samples", type=_positive, default=8, help="evaluations a class (default: %(default)s)")
    one.add_argument("--class_labels", type=int, nargs="+", help="to choose among; default: all")
    one = command(
        "score", "A parquet table with one row for each image. A killed run goes on where it was.", "checkpoint"
    )
    one.add_argument("table", help="the parquet file to write")
    one.add_argument("--num_samples", type=_positive, default=16, help="evaluations an image (default: %(default)s)")
    one.add_argument("--class_samples", type=_positive, default=8, help="evaluations a class (default: %(default)s)")
    one.add_argument(
        "--rows_a_part", type=_positive, default=256, help="images computed and kept at a time (default: %(default)s)"
    )
    one.add_argument(
        "--share",
        default="0/1",
        help="i/n: every n-th part from the i-th on, for several machines (default: %(default)s)",
    )
    one = command("sample", "Samples of a model, as one picture.", "checkpoint", images=False)
    one.add_argument("picture", help="the PNG file to write")
    one.add_argument("--num_images", type=_positive, default=16, help="(default: %(default)s)")
    one.add_argument("--num_inference_steps", type=_positive, default=100, help="(default: %(default)s)")
    one.add_argument(
        "--class_labels", type=int, nargs="+", help="one for all, or one for each image; default: in turn"
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = _parser().parse_args(argv)
    from diffusers.utils import logging

    from vdm_diffusers.command_line.sources import InputError
    from vdm_diffusers.manifest import CheckpointError

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    commands = {"evaluate": _evaluate, "compare": _compare, "classify": _classify, "score": _score, "sample": _sample}
    try:
        result, text = commands[args.command](args)
    except (InputError, CheckpointError, ValueError) as error:
        print(f"vdm-diffusers {args.command}: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print(f"vdm-diffusers {args.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(json.dumps(_without_nan(result)) if args.json else text)
    return 0


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _load(args: argparse.Namespace, checkpoint: str) -> Any:
    import torch

    from vdm_diffusers.loading import load_model

    default = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return load_model(checkpoint, args.device or default)


def _images(args: argparse.Namespace, pipeline: Any) -> Any:
    from vdm_diffusers.command_line.sources import network_channels, read_images

    levels = pipeline.config.get("num_levels", 256)
    return read_images(
        args.images,
        levels,
        network_channels(pipeline),
        split=args.split,
        label_column=args.label_column,
        max_images=args.max_images,
    )


def _common(args: argparse.Namespace) -> dict[str, Any]:
    return {"generator": args.seed, "batch_size": args.batch_size, "progress_bar": not (args.quiet or args.json)}


def _labels(args: argparse.Namespace, pipeline: Any, images: Any) -> Any:
    from vdm_diffusers.models.labels import is_class_conditional

    if args.class_label is not None:
        return args.class_label
    return images.labels if is_class_conditional(getattr(pipeline, "unet", None)) else None


def _estimation(args: argparse.Namespace) -> dict[str, Any]:
    names = ("num_samples", "method", "num_steps", "target_standard_error")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None} | _common(args)


def _evaluate(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from vdm_diffusers.evaluation import evaluate_likelihood

    pipeline = _load(args, args.checkpoint)
    images = _images(args, pipeline)
    report = evaluate_likelihood(
        pipeline, images.levels, class_labels=_labels(args, pipeline, images), **_estimation(args)
    )
    return report.to_dict(), str(report)


def _compare(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from vdm_diffusers.evaluation import compare_likelihood

    a, b = _load(args, args.a), _load(args, args.b)
    images = _images(args, a)
    sides = [{"class_labels": labels} if (labels := _labels(args, p, images)) is not None else {} for p in (a, b)]
    report = compare_likelihood(a, b, images.levels, a_options=sides[0], b_options=sides[1], **_estimation(args))
    lines = [str(report)]
    if report.bands:
        lines.append("log SNR        difference (bits/dim)")
        lines += [
            f"{band['log_snr_low']:+6.1f} {band['log_snr_high']:+6.1f}  {band['difference']:+.5f} +- "
            f"{band['standard_error']:.5f}"
            for band in report.bands
        ]
    return report.to_dict(), "\n".join(lines)


def _classify(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from vdm_diffusers.evaluation import classify

    pipeline = _load(args, args.checkpoint)
    images = _images(args, pipeline)
    report = classify(pipeline, images.levels, args.class_labels, num_samples=args.num_samples, **_common(args))
    result = report.to_dict() | {"files": images.names}
    best, probabilities = report.best, report.probabilities
    lines = [
        f"{name}  {report.classes[k]}  {probabilities[i, k]:.3f}"
        for i, (name, k) in enumerate(zip(images.names, best.tolist(), strict=True))
    ]
    if images.labels is not None:
        right = [p == label for p, label in zip(report.predictions, images.labels.tolist(), strict=True)]
        result["accuracy"] = sum(right) / len(right)
        lines.append(f"accuracy {result['accuracy']:.4f} on {len(right)} images")
    return result, "\n".join(lines)


def _score(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from vdm_diffusers.command_line.scoring import score
    from vdm_diffusers.command_line.sources import InputError

    numbers = args.share.split("/")
    if len(numbers) != 2 or not all(n.isdecimal() for n in numbers) or int(numbers[0]) >= int(numbers[1]):
        raise InputError(f"--share must be i/n with 0 <= i < n, got {args.share}.")
    pipeline = _load(args, args.checkpoint)
    images = _images(args, pipeline)
    path = score(
        pipeline,
        images,
        Path(args.table).expanduser(),
        num_samples=args.num_samples,
        class_samples=args.class_samples,
        seed=args.seed,
        batch_size=args.batch_size,
        rows_a_part=args.rows_a_part,
        share=(int(numbers[0]), int(numbers[1])),
        progress_bar=not (args.quiet or args.json),
    )
    whole = path.is_file()
    text = f"wrote {path}, {len(images)} rows" if whole else f"this share is done; {path} follows when all are"
    return {"table": str(path), "rows": len(images), "is_whole": whole}, text


def _sample(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    import torch

    from vdm_diffusers.command_line.sources import InputError
    from vdm_diffusers.models.labels import is_class_conditional, num_classes
    from vdm_diffusers.pictures import image_grid

    pipeline = _load(args, args.checkpoint)
    if not hasattr(pipeline, "unet"):
        raise InputError(
            f"{args.checkpoint} is a {type(pipeline).__name__}: its samples are drawn in Python, model.sample(...)."
        )
    pipeline.set_progress_bar_config(disable=args.quiet or args.json)
    options: dict[str, Any] = {}
    if is_class_conditional(pipeline.unet):
        labels = args.class_labels or [n % (num_classes(pipeline.unet) or 1) for n in range(args.num_images)]
        options["class_labels"] = labels * args.num_images if len(labels) == 1 else labels
    elif args.class_labels:
        raise InputError("--class_labels: the model is not class-conditional.")
    images = pipeline(
        batch_size=args.num_images,
        num_inference_steps=args.num_inference_steps,
        generator=torch.Generator().manual_seed(args.seed),
        output_type="pt",
        **options,
    ).images
    picture = Path(args.picture).expanduser()
    image_grid((images.cpu() * 255).round().long(), 256).save(picture)
    return {"picture": str(picture), "num_images": len(images)}, f"wrote {picture}, {len(images)} samples"
