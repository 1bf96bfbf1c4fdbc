"""A table with one row for each image of a data set: how likely it is, where its bits are, whether its label fits."""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vdm_diffusers.command_line.sources import InputError, NamedImages
from vdm_diffusers.evaluation import classify, evaluate_likelihood
from vdm_diffusers.models.labels import null_label, num_classes
from vdm_diffusers.repetitions import mix_seed

_TERMS = ("prior", "diffusion", "reconstruction")


def score(
    pipeline: Any,
    images: NamedImages,
    output: Path,
    *,
    num_samples: int = 16,
    class_samples: int = 8,
    seed: int = 0,
    batch_size: int | None = None,
    rows_a_part: int = 256,
    share: tuple[int, int] = (0, 1),
    progress_bar: bool = True,
) -> Path:
    """Write `output`, a parquet file with one row for each image.

    Columns: `index`, `file`, `label`; `bits_per_dim` with its `error`, and its terms `prior`, `diffusion`,
    `reconstruction`; `octave_K`, the diffusion term between alpha / sigma = 2^K and 2^(K+1), all in bits/dim;
    `complexity`, the bits/dim of a lossless general compressor (zlib), and `bits_minus_complexity`, which tells
    unusual images from merely complicated ones (Serra et al. 2020); with labels and a class-conditional model
    `label_log_odds`, ln of the odds of the stated label against the best other one.

    The rows are computed in parts, each written whole: a run that was killed goes on with the next part, and the table
    is the same.

    Args:
        num_samples, class_samples: evaluations of the network for each image, and for each of its classes.
        rows_a_part: images to a part.
        share: (i, n): this process computes every n-th part from the i-th on. The one that finds all parts there joins
            them.
    Raises:
        InputError: pyarrow is missing; `output` is there and is of other images or another model.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("a table needs pyarrow: pip install 'vdm-diffusers[data]'.") from error
    identity = _identity(pipeline, images, num_samples, class_samples, seed, rows_a_part)
    folder = output.with_name(f"{output.name}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    stated = folder / "identity.json"
    if stated.is_file() and json.loads(stated.read_text(encoding="utf-8")) != identity:
        raise InputError(
            f"{folder} holds parts of another model, other images or other arguments: name another file, or delete "
            "the folder."
        )
    if output.is_file() and not stated.is_file():
        raise InputError(f"{output} exists: name another file, or delete it.")
    stated.write_text(json.dumps(identity), encoding="utf-8")
    starts = list(range(0, len(images), rows_a_part))
    files = [folder / f"part-{number:06d}.parquet" for number in range(len(starts))]
    with tqdm(total=len(images), unit="image", disable=not progress_bar) as bar:
        for number, start in enumerate(starts):
            part = images.part(start, start + rows_a_part)
            if number % share[1] == share[0] and not files[number].is_file():
                rows = _rows(
                    pipeline, part, start, mix_seed(seed, "score", number), num_samples, class_samples, batch_size
                )
                _write(pyarrow.table(rows), files[number])
            bar.update(len(part))
    if all(file.is_file() for file in files):
        tables = [pyarrow.parquet.read_table(file) for file in files]
        _write(pyarrow.concat_tables(tables, promote_options="default"), output)
    return output


def _write(table: Any, path: Path) -> None:
    import pyarrow.parquet

    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    pyarrow.parquet.write_table(table, unfinished)
    unfinished.replace(path)


def _rows(
    pipeline: Any,
    images: NamedImages,
    start: int,
    seed: int,
    num_samples: int,
    class_samples: int,
    batch_size: int | None,
) -> dict[str, list[Any]]:
    classes = num_classes(getattr(pipeline, "unet", None))
    null = null_label(getattr(pipeline, "unet", None))
    labels = images.labels
    # odd images are odd whatever they are called: the bits are those without a label where the network knows them
    given: Any = None if classes is None else (null if null is not None else labels)
    if classes is not None and given is None:
        raise InputError(
            "the model is class-conditional and the images have no labels: name their column, or use folders."
        )
    common: dict[str, Any] = {"generator": seed, "batch_size": batch_size, "progress_bar": False}
    report = evaluate_likelihood(pipeline, images.levels, class_labels=given, num_samples=num_samples, **common)
    to_bits = 1 / (report.num_dims * math.log(2))
    rows: dict[str, list[Any]] = {"index": list(range(start, start + len(images))), "file": images.names}
    if labels is not None:
        rows["label"] = labels.tolist()
    rows["bits_per_dim"] = (report.nats * to_bits).tolist()
    if report.nats_error is not None:
        rows["error"] = (report.nats_error * to_bits).tolist()
    for name in _TERMS:
        if (term := getattr(report, name)) is not None:
            rows[name] = (term * to_bits).tolist()
    if report.log_snr_edges is not None and report.nats_by_log_snr is not None:
        for edge, column in zip(report.log_snr_edges.tolist(), report.nats_by_log_snr.T, strict=False):
            rows[f"octave_{round(edge / (2 * math.log(2)))}"] = (column * to_bits).tolist()
    complexity = [complexity_bits(image) for image in images.levels]
    rows["complexity"] = complexity
    rows["bits_minus_complexity"] = [b - c for b, c in zip(rows["bits_per_dim"], complexity, strict=True)]
    if classes is not None and labels is not None:
        found = classify(
            pipeline, images.levels, range(classes), num_samples=class_samples, drop_unlikely=False, **common
        )
        own = found.log_odds.gather(1, labels[:, None])[:, 0]
        others = found.log_odds.scatter(1, labels[:, None], -math.inf).max(1).values
        rows["label_log_odds"] = (own - others).tolist()
        rows["most_likely_label"] = found.best.tolist()
    return rows


def complexity_bits(image: Tensor) -> float:
    """bits/dim of an image (C, H, W) compressed by zlib at its best, each row as differences of neighbouring pixels,
    as PNG does.
    """
    if int(image.max()) > 255:
        data = image.to(torch.int32).contiguous().numpy().tobytes()
    else:
        pixels = image.to(torch.int16)
        steps = torch.cat([pixels[..., :1], pixels[..., 1:] - pixels[..., :-1]], dim=-1) % 256
        data = steps.to(torch.uint8).contiguous().numpy().tobytes()
    return 8 * len(zlib.compress(data, 9)) / image.numel()


def _identity(pipeline: Any, images: NamedImages, *arguments: Any) -> dict[str, str]:
    """What parts of one table have in common."""
    digest = hashlib.blake2b(repr((arguments, images.names, tuple(images.levels.shape))).encode(), digest_size=16)
    digest.update(images.levels.contiguous().numpy().tobytes())
    network = getattr(pipeline, "unet", pipeline)
    for tensor in network.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {"identity": digest.hexdigest()}
