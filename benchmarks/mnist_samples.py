"""Whether samples of an MNIST model are digits: what a classifier of real ones says of them, and whether they are copies.

A small convolutional network is trained on MNIST's training images, and its accuracy on the test images is printed first. Then, of
samples drawn from the model: how sure it is of them beside test images (mean of the highest probability), the share of each class, for a
class-conditional model how often it names the class that was asked for, and the distance to the nearest training image beside that
of test images.

    python benchmarks/mnist_samples.py --checkpoint model_cards/mnist-class [--num_images 1000] [--num_inference_steps 100]
                                       [--dataset_name ylecun/mnist] [--output mnist_samples.json]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
from arguments import DataArguments
from data import load_split

from vdm_diffusers.loading import load_model
from vdm_diffusers.models.labels import is_class_conditional
from vdm_diffusers.pictures import image_grid


class Classifier(nn.Sequential):
    """Two convolutions and two linear layers, some 99% accurate after two epochs."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 24, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(24, 48, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(48 * 16, 128), nn.ReLU(), nn.Linear(128, 10),
        )  # fmt: skip


def train_classifier(images: Tensor, labels: Tensor, epochs: int) -> Classifier:
    """Trained on shifted images, so that it looks at shapes."""
    torch.manual_seed(0)
    model = Classifier()
    steps = epochs * len(images) // 128
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in tqdm(range(steps), desc="classifier"):
        rows = torch.randint(len(images), (128,))
        x = images[rows].float() / 255
        shift = torch.randint(-2, 3, (2,)).tolist()
        loss = F.cross_entropy(model(torch.roll(x, shift, dims=(2, 3))), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return model.eval()


@torch.no_grad()
def probabilities(model: Classifier, images: Tensor) -> Tensor:
    """(N, 10) for levels 0..255."""
    return torch.cat([F.softmax(model(part.float() / 255), dim=1) for part in images.split(500)])


def nearest(images: Tensor, others: Tensor) -> Tensor:
    """(N,) root-mean-square distance of pixels, in levels, to the nearest of `others`."""
    flat = others.flatten(1).float()
    return torch.cat([torch.cdist(part.flatten(1).float(), flat).min(1).values for part in images.split(200)]) / 28


@torch.no_grad()
def draw(pipe: Any, number: int, steps: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """Samples as levels, and the classes asked for, in turn."""
    parts, asked = [], []
    conditional = is_class_conditional(pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    for start in tqdm(range(0, number, 100), desc="samples"):
        labels = torch.arange(start, min(start + 100, number)) % 10
        images = pipe(
            batch_size=len(labels),
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed + start),
            output_type="pt",
            **({"class_labels": labels} if conditional else {}),
        ).images
        parts.append((images * 255).round().to(torch.uint8))
        asked.append(labels)
    return torch.cat(parts), torch.cat(asked) if conditional else None


def main() -> None:
    """Print the figures, and write them as JSON, with a grid of the samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="model_cards/mnist-class")
    parser.add_argument("--dataset_name", default="ylecun/mnist")
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--num_inference_steps", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("mnist_samples.json"))
    args = parser.parse_args()
    data = DataArguments(dataset_name=args.dataset_name, image_mode="L")
    train, test = (load_split(data, split, 0) for split in ("train", "test"))
    assert train.labels is not None and test.labels is not None
    model = train_classifier(train.images, train.labels, args.epochs)
    of_test = probabilities(model, test.images)
    accuracy = float((of_test.argmax(1) == test.labels).double().mean())
    print(f"classifier: {accuracy:.4f} accurate on {len(test)} test images")
    pipe = load_model(args.checkpoint)
    samples, asked = draw(pipe, args.num_images, args.num_inference_steps, args.seed)
    image_grid(samples[:100], 256).save(args.output.with_suffix(".png"))
    of_samples = probabilities(model, samples)
    shares = of_samples.argmax(1).bincount(minlength=10) / len(samples)
    expected = test.labels.bincount(minlength=10) / len(test) if asked is None else torch.full((10,), 0.1)
    some = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:20_000]
    distances = [nearest(images, train.images[some]) for images in (samples, test.images[: len(samples)])]
    result = {
        "accuracy_of_the_classifier": accuracy,
        "top_probability_test": float(of_test.max(1).values.mean()),
        "top_probability_samples": float(of_samples.max(1).values.mean()),
        "as_asked": None if asked is None else float((of_samples.argmax(1) == asked).double().mean()),
        "shares": shares.tolist(),
        "largest_ratio_to_its_share": float(torch.maximum(shares / expected, expected / shares.clamp(min=1e-9)).max()),
        "nearest_training_image_samples": float(distances[0].min()),
        "nearest_training_image_test": float(distances[1].min()),
        "num_images": len(samples),
        "num_inference_steps": args.num_inference_steps,
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for name, value in result.items():
        print(f"{name.replace('_', ' '):34}", value if not isinstance(value, list) else [round(v, 3) for v in value])


if __name__ == "__main__":
    main()
