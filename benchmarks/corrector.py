"""What Langevin's corrector is worth on a trained, score-predicting network, at equal numbers of network evaluations.

The network is the published digits model that predicts the score. `ancestral` spends every evaluation on a step of the
scheduler; `corrected` takes half as many steps, each followed by one Langevin step at the level it arrived at. Samples
are compared with digits that the network never saw by the sliced Wasserstein distance in pixel space (pixels in [0,
1]), and by how sure a classifier of the real digits is of them. `real` is as many of the training images: the floor.

    python benchmarks/corrector.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.svm import SVC
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
from arguments import DataArguments
from data import load_split

from vdm_diffusers import VDMPipeline
from vdm_diffusers.pipelines import LangevinCorrector

CHECKPOINT = Path(__file__).resolve().parents[1] / "model_cards" / "digits-score"


def sliced_wasserstein(a: Tensor, b: Tensor, directions: Tensor) -> float:
    """Mean over directions of the Wasserstein-1 distance of the projections, of sets of any two sizes."""
    quantiles = torch.linspace(0, 1, 1001)
    a, b = ((points @ directions).quantile(quantiles, dim=0) for points in (a, b))
    return float((a - b).abs().mean())


def main() -> None:
    """Print one line for each number of evaluations and sampler."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(CHECKPOINT))
    parser.add_argument("--evaluations", type=int, nargs="+", default=[10, 20, 40])
    parser.add_argument("--signal_to_noise_ratio", type=float, nargs="+", default=[0.05, 0.16])
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3, help="independent sets of samples")
    args = parser.parse_args()
    splits = {name: load_split(DataArguments(), name, seed=0) for name in ("train", "test")}
    pixels = {name: split.images.flatten(1).float() / 16 for name, split in splits.items()}
    classifier = CalibratedClassifierCV(SVC(), ensemble=False).fit(pixels["train"].numpy(), splits["train"].labels)
    directions = torch.nn.functional.normalize(
        torch.randn(pixels["test"].shape[1], 512, generator=torch.Generator().manual_seed(0)), dim=0
    )
    pipe = VDMPipeline.from_pretrained(args.checkpoint)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, stochasticity=1.0)

    def line(name: str, sets: list[Tensor]) -> None:
        distance = torch.tensor([sliced_wasserstein(found, pixels["test"], directions) for found in sets])
        sure = torch.tensor([classifier.predict_proba(found.numpy()).max(1).mean() for found in sets])
        print(
            f"{name:<44}{distance.mean():>9.4f} +- {distance.std():.4f}{sure.mean():>9.3f} +- {sure.std():.3f}",
            flush=True,
        )

    print(f"{'':<44}{'distance':>9}{'':>10}{'surety':>9}   (+-: scatter of {args.repeats} sets)")
    shuffled = pixels["train"][torch.randperm(len(pixels["train"]), generator=torch.Generator().manual_seed(0))]
    line("real", list(shuffled[: args.repeats * (len(shuffled) // args.repeats)].chunk(args.repeats)))
    for evaluations in args.evaluations:
        samplers: dict[str, tuple[int, float | None]] = {f"{evaluations} evaluations, ancestral": (evaluations, None)}
        for ratio in args.signal_to_noise_ratio:
            samplers[f"{evaluations} evaluations, corrected, ratio {ratio:g}"] = (evaluations // 2, ratio)
        for name, (steps, ratio) in samplers.items():
            sets = []
            for seed in range(args.repeats):
                generator = torch.Generator().manual_seed(seed)
                corrector = None if ratio is None else LangevinCorrector(1, ratio, generator=generator)
                drawn = pipe(
                    args.samples, steps, generator=generator, output_type="np", callback_on_step_end=corrector
                ).images
                sets.append(torch.from_numpy(drawn).flatten(1).float())
            line(name, sets)


if __name__ == "__main__":
    main()
