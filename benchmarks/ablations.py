"""What each part of VDM's training is worth: one table from one command, the same network, budget and seeds for every
row.

    python benchmarks/ablations.py                  # the digits that come with scikit-learn
    python benchmarks/ablations.py --data mnist     # MNIST

The network and its budget stand in ablations_digits.yaml and ablations_mnist.yaml. Each row changes one thing of the
first (ELBO, Fourier features, fixed schedule, stratified times). What stands after `--` goes to every train.py. The
figure is the bits/dim of the test split (or its first --eval_max_images) with the averaged weights, its error that of
the mean over the seeds; the difference to the first row is taken seed by seed, since equal seeds share data order,
times and noise. Finished runs are read again, not repeated. `samples.png` shows the rows' samples, from the same
noise, below each other.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
import train
from arguments import ARGUMENTS_FILE, DataArguments, parse_arguments
from data import ImageSet, default_test_split, load_split, load_splits
from evaluating import bits_per_dim, draw_samples
from networks import make_network
from plots import image_grid

from vdm_diffusers import VDMPipeline

# Name -> arguments of train.py. The network without Fourier features comes from a config, which is written beside the
# runs.
ROWS: dict[str, list[str]] = {
    "all parts": [],
    "no Fourier features": ["--model_config_name_or_path", "no_fourier.json"],
    "simple loss": ["--loss", "simple"],
    "learned schedule": ["--learn_schedule", "True"],
    "adaptive t": ["--time_sampling", "adaptive"],
    "independent t": ["--time_sampling", "uniform"],
}


def without_fourier(tokens: list[str], path: Path) -> None:
    """Write the config of the same network without Fourier features."""
    args = parse_arguments(tokens)
    images, _ = load_splits(args.data, args.optimization.seed)
    config = dict(make_network(args, images).config)
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    path.write_text(json.dumps({"_class_name": "VDMUNet2DModel", **config, "fourier_exponents": []}, indent=2))


def result_of(folder: Path, tokens: list[str], num_samples: int, max_images: int | None) -> float:
    """Test bits/dim of a run, which is trained first if it has not been."""
    found = folder / "test.json"
    if not found.is_file():
        if not (folder / "model_index.json").is_file():
            state = train.main([*tokens, "--output_dir", str(folder), "--resume_from_checkpoint", "latest"])
            if state != 0:
                raise SystemExit(f"train.py ended with {state}")
        pipeline, images = VDMPipeline.from_pretrained(folder), test_images(folder, max_images)
        pipeline.unet.eval()
        result = bits_per_dim(pipeline, images, seed=0, num_samples=num_samples, batch_size=256)
        found.write_text(json.dumps(result))
    return float(json.loads(found.read_text())["bits_per_dim"])


def test_images(folder: Path, max_images: int | None) -> ImageSet:
    arguments = json.loads((folder / ARGUMENTS_FILE).read_text(encoding="utf-8"))["arguments"]
    data = DataArguments(**{name: arguments[name] for name in DataArguments.__dataclass_fields__ if name in arguments})
    images = load_split(data, default_test_split(data), arguments["seed"])
    return images if max_images is None else images.first(max_images)


def samples_of(folder: Path, num_steps: int) -> Tensor:
    pipeline = VDMPipeline.from_pretrained(folder)
    pipeline.unet.eval()
    return draw_samples(pipeline, 16, seed=0, num_inference_steps=num_steps, batch_size=16)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    spread = torch.tensor(values, dtype=torch.float64)
    return float(spread.mean()), float(spread.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def main() -> None:
    """Train what is missing, print the table, draw the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits", help="which ablations_*.yaml")
    parser.add_argument("--output_dir", type=Path, default=None, help="default: outputs/ablations-DATA")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--eval_num_samples", type=int, default=16)
    parser.add_argument("--eval_max_images", type=int, default=None, help="default: the whole test split")
    parser.add_argument("--num_inference_steps", type=int, default=100)
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, common = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    args.output_dir = args.output_dir or Path("outputs") / f"ablations-{args.data}"
    common = ["--config", str(Path(__file__).with_name(f"ablations_{args.data}.yaml")), *common]
    common += ["--eval_steps", "0", "--sample_steps", "0", "--logger", "none"]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    without_fourier(common, args.output_dir / "no_fourier.json")

    table: dict[str, list[float]] = {}
    for seed in range(args.seeds):
        for name in args.rows:
            own = [str(args.output_dir / token) if token.endswith(".json") else token for token in ROWS[name]]
            folder = args.output_dir / f"{name.replace(' ', '_')}-{seed}"
            value = result_of(
                folder, [*common, *own, "--seed", str(seed)], args.eval_num_samples, args.eval_max_images
            )
            table.setdefault(name, []).append(value)
    first = table[args.rows[0]]
    print(f"{'':<22}{'test bits/dim':>18}{'against the first row':>26}")
    for name, values in table.items():
        mean, error = mean_and_error(values)
        difference, its_error = mean_and_error([a - b for a, b in zip(values, first, strict=True)])
        print(f"{name:<22}{mean:>10.4f} +- {error:.4f}{difference:>+16.4f} +- {its_error:.4f}")
    (args.output_dir / "table.json").write_text(json.dumps(table, indent=2))
    folders = [args.output_dir / f"{name.replace(' ', '_')}-0" for name in args.rows]
    levels = torch.cat([samples_of(folder, args.num_inference_steps) for folder in folders])
    num_levels = VDMPipeline.from_pretrained(folders[0]).config.num_levels
    image_grid(levels, num_levels, columns=16, smallest_side=800).save(args.output_dir / "samples.png")
    print(f"wrote table.json and samples.png (16 samples a row, in the table's order) to {args.output_dir}")


if __name__ == "__main__":
    main()
