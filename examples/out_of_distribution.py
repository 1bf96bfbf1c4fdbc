"""Out-of-distribution scores: how well do bits/dim tell digits from images that are not, and how well does a
correction?

A likelihood alone is a poor score, because simple images are likely under any model of images; its difference to a
general compressor's length is a better one (Serrà et al. 2020, "Input complexity and out-of-distribution detection
with likelihood-based generative models").

    python examples/out_of_distribution.py [--checkpoint model_cards/digits-elbo]
"""

from __future__ import annotations

import argparse
import zlib

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor

from vdm_diffusers import VDMPipeline, evaluate_likelihood


def compressed_bits(images: Tensor) -> Tensor:
    """Bits of every image after zlib: what a compressor that knows nothing of digits needs."""
    return torch.tensor([8.0 * len(zlib.compress(image.numpy().tobytes(), 9)) for image in images])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="model_cards/digits-elbo", help="a pipeline of the 8x8 digits")
    parser.add_argument("--num_images", type=int, default=100, help="of each kind")
    arguments = parser.parse_args(argv)
    pipeline = VDMPipeline.from_pretrained(arguments.checkpoint)
    generator = torch.Generator().manual_seed(0)

    test = np.random.default_rng(0).permutation(1797)[1500:]  # the split that training/train.py never looks at
    digits = torch.from_numpy(load_digits().images[test]).to(torch.uint8)[: arguments.num_images, None]
    kinds = {
        "digits": digits,
        "upside down": digits.flip(2),
        "inverted": 16 - digits,
        "pixels shuffled": digits.flatten(2)[..., torch.randperm(64, generator=generator)].reshape(digits.shape),
        "one grey": torch.arange(len(digits)).remainder(17)[:, None, None, None].expand(digits.shape).to(torch.uint8),
    }
    scores = {}
    for name, images in kinds.items():
        report = evaluate_likelihood(pipeline, images, num_samples=32, generator=generator)
        bits = report.nats / torch.log(torch.tensor(2.0))
        scores[name] = {"likelihood": bits, "less complexity": bits - compressed_bits(images.contiguous())}
        print(f"{name:16s} {report}")
    print(f"\n{'AUROC against digits':22s}" + "".join(f"{score:>18s}" for score in scores["digits"]))
    for name in list(kinds)[1:]:
        row = ""
        for score, own in scores["digits"].items():
            both = torch.cat([own, scores[name][score]])
            label = torch.cat([torch.zeros(len(own)), torch.ones(len(scores[name][score]))])
            row += f"{roc_auc_score(label, both):18.3f}"
        print(f"{name:22s}{row}")


if __name__ == "__main__":
    main()
