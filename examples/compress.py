#!/usr/bin/env python
"""Losslessly compress images with a diffusion model, and compare with PNG, WebP and JPEG XL.

    python examples/compress.py images/ out.vdm --model model_cards/mnist-elbo --steps 64
    python examples/compress.py out.vdm images_back/ --model model_cards/mnist-elbo --decompress

The images are the PNG files of a folder, in the order of their names, all of one size. The model is one of this size:
of the same channels and levels. JPEG XL needs `pip install imagecodecs`; where it is missing its column is left out.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vdm_diffusers import VDMPipeline, VDMScheduler
from vdm_diffusers.compression import CodingError, FileError, compress_with_report, decompress

MODES = {1: "L", 3: "RGB"}


def read_images(folder: Path) -> torch.Tensor:
    """(N, C, H, W) uint8, the PNG files of a folder.

    Raises:
        ValueError: there is none, or they are not all of one size and kind.
    """
    paths = sorted(folder.glob("*.png"))
    if not paths:
        raise ValueError(f"{folder} holds no PNG file.")
    arrays = []
    for path in paths:
        with Image.open(path) as image:
            array = np.asarray(image if image.mode in MODES.values() else image.convert("RGB"))
        arrays.append(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))
        if arrays[-1].shape != arrays[0].shape:
            raise ValueError(
                f"{path} is of size {arrays[-1].shape}, {paths[0]} of size {arrays[0].shape}: all must be alike."
            )
    return torch.from_numpy(np.stack(arrays))


def write_atomically(path: Path, data: bytes) -> None:
    """Under its final name the file is whole, or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def sizes_elsewhere(images: torch.Tensor) -> dict[str, tuple[int, int]]:
    """Bytes in other lossless formats: one file an image, and all as one mosaic."""
    arrays = [np.ascontiguousarray(image.permute(1, 2, 0).numpy().squeeze()) for image in images]
    columns = int(np.ceil(np.sqrt(len(arrays))))
    blank = [np.zeros_like(arrays[0])] * (-len(arrays) % columns)
    rows = [np.concatenate((arrays + blank)[i : i + columns], axis=1) for i in range(0, len(arrays), columns)]
    mosaic = np.concatenate(rows, axis=0)

    def pillow(array: np.ndarray, **options: object) -> int:
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, **options)  # type: ignore[arg-type]
        return len(buffer.getvalue())

    def size(array: np.ndarray, name: str) -> int:
        if name == "PNG":
            return pillow(array, format="PNG", optimize=True)
        if name == "WebP":
            return pillow(array, format="WEBP", lossless=True, quality=100, method=6)
        from imagecodecs import jpegxl_encode

        return len(jpegxl_encode(array, lossless=True, effort=9))

    result = {}
    for name in ("PNG", "WebP", "JPEG XL"):
        try:
            result[name] = (sum(size(array, name) for array in arrays), size(mosaic, name))
        except ImportError:
            print(f"{name} is left out: pip install imagecodecs", file=sys.stderr)
    return result


def load(name: str, table: str | None) -> VDMPipeline:
    """The model, with the chain of ancestral sampling, and with `table` the optimal reverse variance that was
    measured.
    """
    pipe = VDMPipeline.from_pretrained(name)
    options: dict[str, object] = {"stochasticity": 1.0}
    if table is not None:
        options |= {"variance_type": "optimal", "optimal_variance": torch.load(table, weights_only=True)}
    pipe.scheduler = VDMScheduler.from_config(pipe.scheduler.config, **options)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of PNG files, or with --decompress a file")
    parser.add_argument("target", type=Path, help="file to write, or with --decompress a folder")
    parser.add_argument("--model", default="model_cards/digits-elbo", help="folder or Hub id of a VDMPipeline")
    parser.add_argument(
        "--steps", type=int, default=50, help="steps of the chain: more make a smaller file and take longer"
    )
    parser.add_argument("--grid", choices=["time", "log_snr", "optimal"], help="where they are")
    parser.add_argument(
        "--variance", help="file of a measured optimal variance (torch.save of estimate_optimal_variance's result)"
    )
    parser.add_argument("--decompress", action="store_true", help="the other way")
    parser.add_argument("--no_comparison", action="store_true", help="do not compute other formats' sizes")
    parser.add_argument("--overwrite", action="store_true", help="replace a target that exists")
    args = parser.parse_args(argv)
    try:
        if not args.source.exists():
            raise ValueError(f"there is no {args.source}.")
        if args.target.exists() and not args.overwrite:
            raise ValueError(f"{args.target} exists: choose another target, or pass --overwrite.")
        pipe = load(args.model, args.variance)
        if args.decompress:
            images = decompress(pipe, args.source.read_bytes())
            args.target.mkdir(parents=True, exist_ok=True)
            for number, image in enumerate(images):
                array = image.permute(1, 2, 0).numpy().astype(np.uint8).squeeze()
                buffer = io.BytesIO()
                Image.fromarray(array).save(buffer, format="PNG")
                write_atomically(args.target / f"{number:06d}.png", buffer.getvalue())
            print(f"{len(images)} images in {args.target}")
            return 0
        images = read_images(args.source)
        data, report = compress_with_report(pipe, images, num_steps=args.steps, grid=args.grid)
        write_atomically(args.target, data)
    except (ValueError, FileError, CodingError, OSError, ImportError) as error:
        print(f"compress.py: error: {error}", file=sys.stderr)
        return 2
    print(report)
    dims = images.numel()
    rows = [("this file", len(data), None)]
    rows += [] if args.no_comparison else [(name, *sizes) for name, sizes in sizes_elsewhere(images).items()]
    print("| format | bytes | bits/dim | as one mosaic: bits/dim |\n|---|---|---|---|")
    for name, total, mosaic in rows:
        print(
            f"| {name} | {total} | {8 * total / dims:.3f} | {'-' if mosaic is None else f'{8 * mosaic / dims:.3f}'} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
