"""A training step of train.py against the loop of Diffusers' `train_unconditional.py`, interleaved in one run.

    python benchmarks/training_throughput.py                  # 2 to 3 minutes on a CPU
    python benchmarks/training_throughput.py --width 64 --precision bf16 --compile --variants reference all train.py

Both train the same `UNet2DModel` on the same images: PNG files in a `datasets` data set, batches of the same size,
DDPM's 1000 steps and |eps - eps_hat|^2, AdamW, a moving average of the weights, in the same precision. `reference`
does a step in that script's order and with its means: a DataLoader that decodes each image with PIL and transforms it,
DDPMScheduler.add_noise, AdamW, its learning-rate scheduler, `EMAModel`, `loss.item()`, a progress bar and a tracker at
every step. Each other variant is the reference with one thing changed; `all` has every change; `train.py` is the
trainer itself. Variants take turns, a few steps at a time; the figures are medians of the turns, and ratios to the
reference's turn beside each, so that a busy machine slows all alike.

`outside` is the step less the model's forward pass and the backward pass. On a CPU all times are processor time, which
other work on the machine does not lengthen; with one thread that is what an idle machine would take.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from arguments import parse_arguments
from data import load_splits
from ema import EMA
from networks import compile_network
from train import Batches, DataOrder, Training

CHANGES = ("input", "fused", "ema", "no_item", "channels_last", "compile")
NUM_IMAGES, SIZE = 2048, 32


def make_data(folder: Path) -> None:
    """PNG files of smooth pictures, as a data set on the disk."""
    generator = np.random.default_rng(0)
    files = []
    for _ in range(NUM_IMAGES):
        small = PIL.Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC).save(buffer, format="PNG")
        files.append({"bytes": buffer.getvalue(), "path": None})
    split = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": split}).save_to_disk(folder)


def network_config(width: int) -> dict[str, object]:
    """A UNet2DModel of two resolutions: 0.04M weights at width 8, 1M at width 40."""
    return {
        "sample_size": SIZE,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "block_out_channels": (width, 2 * width),
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }


def to_tensor(image: PIL.Image.Image) -> Tensor:
    """RandomHorizontalFlip, ToTensor, Normalize([0.5], [0.5]) of torchvision, which is no dependency; its operations
    in its order.
    """
    image = image.convert("RGB")
    if torch.rand(1) < 0.5:
        image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image, np.uint8, copy=True)).view(image.size[1], image.size[0], 3)
    return pixels.permute((2, 0, 1)).contiguous().to(torch.float32).div(255).sub_(0.5).div_(0.5)


def endless(loader: torch.utils.data.DataLoader) -> Iterator[dict[str, Tensor]]:
    while True:
        yield from loader


class Loop:
    """The reference's step, with the changes named in `changes`."""

    def __init__(
        self, accelerator: Accelerator, options: argparse.Namespace, data: Path, changes: tuple[str, ...]
    ) -> None:
        self.accelerator, self.options, self.changes = accelerator, options, changes
        torch.manual_seed(0)
        network = UNet2DModel(**network_config(options.width)).to(accelerator.device)
        if "channels_last" in changes:
            network.to(memory_format=torch.channels_last)
        if "ema" in changes:
            self.average = EMA(network, inv_gamma=1.0, power=0.75, max_decay=0.9999)
        else:
            self.average = EMAModel(
                network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75,
                model_cls=UNet2DModel, model_config=network.config,
            )  # fmt: skip
            self.average.to(accelerator.device)
        if "compile" in changes:
            compile_network(network, accelerator.device, SIZE**2)
        elif accelerator.device.type == "cpu":
            network.forward = INSIDE.wrapped(network.forward)
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8,
            **({"fused": True} if "fused" in changes else {}),
        )  # fmt: skip
        rate = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=500, num_training_steps=10**5)
        self.model, self.optimizer, self.rate = accelerator.prepare(network, optimizer, rate)
        self.noise_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        self.images = images_in_memory(options, data, accelerator) if "input" in changes else None
        self.loader = None if self.images else images_by_loader(options, data, accelerator)
        self.bar = tqdm(total=10**6, file=io.StringIO())
        self.step = 0

    def batch(self) -> Tensor:
        """(B, 3, H, W) in [-1, 1]."""
        if self.images is None:
            return next(self.loader)["input"]
        size = self.options.batch_size
        levels, _ = self.images(self.step * size, size)
        x = levels.to(self.accelerator.device, non_blocking=True).float().div_(127.5).sub_(1)
        flipped = (torch.rand(size) < 0.5).to(x.device)[:, None, None, None]
        return torch.where(flipped, x.flip(-1), x)

    def __call__(self) -> None:
        dtype = torch.bfloat16 if self.options.precision == "bf16" else torch.float32
        clean = self.batch().to(dtype)
        noise = torch.randn(clean.shape, dtype=dtype, device=clean.device)
        timesteps = torch.randint(0, 1000, (len(clean),), device=clean.device).long()
        noisy = self.noise_scheduler.add_noise(clean, noise, timesteps)
        with self.accelerator.accumulate(self.model):
            with precision(self.options, self.accelerator.device):
                output = self.model(noisy, timesteps).sample
            loss = F.mse_loss(output.float(), noise.float())
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.rate.step()
            self.optimizer.zero_grad()
        self.step += 1
        if "ema" in self.changes:
            self.average.update(self.step)
        else:
            self.average.step(self.model.parameters())
        self.bar.update(1)
        if "no_item" not in self.changes or self.step % 50 == 0:
            logs = {"loss": loss.detach().item(), "lr": self.rate.get_last_lr()[0], "step": self.step}
            self.bar.set_postfix(**logs)
            self.accelerator.log(logs, step=self.step)


class Trainer:
    """train.py's own step, with the arguments that mean the same."""

    def __init__(
        self, accelerator: Accelerator, options: argparse.Namespace, data: Path, work: Path, compiled: bool
    ) -> None:
        config = work / "network"
        UNet2DModel(**network_config(options.width)).save_config(config)
        args = parse_arguments(
            [
                *trainer_arguments(options, data),
                *(f"--model_config_name_or_path={config}", f"--output_dir={work / ('run-' + str(compiled))}"),
                *("--loss=simple", "--ddpm_beta_schedule=linear", "--random_flip", "--num_epochs=100000"),
                *("--logger=none", "--checkpointing_steps=1000000000", f"--compile={compiled}"),
                *("--lr_warmup_steps=500", "--checkpoints_total_limit=1"),
            ]
        )
        self.training = Training(args, accelerator)
        network = self.training.network
        if options.precision == "bf16":
            network.forward = in_precision(network.forward, options, accelerator.device)
        if accelerator.device.type == "cpu" and not compiled:
            network.forward = INSIDE.wrapped(network.forward)

    def __call__(self) -> None:
        self.training.optimizer_step()
        if self.training.step % 50 == 0:
            self.training.meter.read(self.training.accelerator)


def precision(options: argparse.Namespace, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bf16 autocast, as Accelerate wraps a model; nothing in float32."""
    bf16 = options.precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


def trainer_arguments(options: argparse.Namespace, data: Path) -> list[str]:
    return [f"--dataset_name={data}", f"--train_batch_size={options.batch_size}", "--pixel_encoding=endpoint"]


def images_in_memory(options: argparse.Namespace, data: Path, accelerator: Accelerator) -> Batches:
    """train.py's images: decoded once."""
    images, _ = load_splits(parse_arguments(trainer_arguments(options, data)).data, 0)
    return Batches(images, DataOrder(len(images), 0), accelerator.device)


def images_by_loader(options: argparse.Namespace, data: Path, accelerator: Accelerator) -> Iterator[dict[str, Tensor]]:
    """The reference's images: decoded and transformed each time they are wanted."""
    split = datasets.load_from_disk(data)["train"]
    split.set_transform(lambda examples: {"input": [to_tensor(image) for image in examples["image"]]})
    loader = torch.utils.data.DataLoader(
        split, batch_size=options.batch_size, shuffle=True, num_workers=options.workers, drop_last=True,
        persistent_workers=options.workers > 0,
    )  # fmt: skip
    return endless(accelerator.prepare(loader))


def in_precision(forward: Callable, options: argparse.Namespace, device: torch.device) -> Callable:
    """The forward pass in --precision."""

    @functools.wraps(forward)
    def wrapper(*inputs, **named):
        with precision(options, device):
            return forward(*inputs, **named)

    return wrapper


class Stopwatch:
    """Adds up the time that the wrapped functions take."""

    def __init__(self) -> None:
        self.total = 0.0

    def wrapped(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapper(*inputs, **named):
            began = clock()
            try:
                return function(*inputs, **named)
            finally:
                self.total += clock() - began

        return wrapper


INSIDE = Stopwatch()
clock = time.perf_counter if torch.cuda.is_available() else time.process_time


def timed(step: Callable[[], object], count: int, device: torch.device) -> tuple[float, float]:
    """Seconds a step, and of them outside the model."""
    INSIDE.total, began = 0.0, clock()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = clock() - began
    return seconds / count, (seconds - INSIDE.total) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--workers", type=int, default=0, help="of the DataLoader; the script's default is 0")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5, help="in a turn")
    parser.add_argument("--compile", action="store_true", help="also torch.compile, alone and with all")
    parser.add_argument("--variants", nargs="*", help="only these (the reference is always there)")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        make_data(work / "data")
        accelerator = Accelerator(
            log_with="tensorboard", project_config=ProjectConfiguration(temporary, logging_dir=str(work / "logs"))
        )
        accelerator.init_trackers("reference")
        if accelerator.device.type == "cpu":
            torch.Tensor.backward = INSIDE.wrapped(torch.Tensor.backward)
        changes = tuple(c for c in CHANGES if c != "compile" or options.compile)
        together = {"all": tuple(c for c in changes if c != "channels_last")}
        if options.compile:
            together["all but compile"] = tuple(c for c in together["all"] if c != "compile")
        compiled_names = {"compile", "all", "train.py, compiled"} if options.compile else set()
        makers: dict[str, Callable[[], Callable[[], None]]] = {}
        for name, chosen in {"reference": (), **{c: (c,) for c in changes}, **together}.items():
            makers[name] = functools.partial(Loop, accelerator, options, work / "data", chosen)
        for compiled in (False, True) if options.compile else (False,):
            name = "train.py, compiled" if compiled else "train.py"
            makers[name] = functools.partial(Trainer, accelerator, options, work / "data", work, compiled)
        wanted = {"reference", *(options.variants or makers)}
        variants = {name: make() for name, make in makers.items() if name in wanted}
        for step in variants.values():  # warm up and compile
            timed(step, 3, accelerator.device)
        turns: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        for _ in range(options.rounds):
            for name, step in variants.items():
                turns[name].append(timed(step, options.steps, accelerator.device))

        loop, memory = variants["reference"], images_in_memory(options, work / "data", accelerator)
        assert isinstance(loop, Loop)
        place = iter(range(0, 10**9, options.batch_size))
        inputs: dict[str, list[tuple[float, float]]] = {"DataLoader": [], "in memory": []}
        for _ in range(options.rounds):
            inputs["DataLoader"].append(timed(loop.batch, 5, accelerator.device))
            inputs["in memory"].append(timed(lambda: memory(next(place), options.batch_size), 5, accelerator.device))

        parameters = sum(p.numel() for p in UNet2DModel(**network_config(options.width)).parameters())
        print(
            f"{parameters / 1e6:.2f}M weights, {options.batch_size} images of 3x{SIZE}x{SIZE}, precision "
            f"{options.precision}, "
            f"{accelerator.device}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, {options.rounds} "
            f"turns of {options.steps} steps"
        )
        print(f"{'':24}{'ms/step':>9}{'ratio':>8}{'outside':>9}{'ratio':>8}")
        for name, times in turns.items():
            pairs = list(zip(turns["reference"], times, strict=True))
            known = accelerator.device.type == "cpu" and name not in compiled_names
            print(
                f"{name:24}"
                + "".join(f"{figure:9.2f}{ratio:8.2f}" for figure, ratio in columns(pairs, inside_known=known))
            )
        pairs = list(zip(*inputs.values(), strict=True))
        for name, times in inputs.items():
            print(f"images, {name:16}{1e3 * statistics.median(t for t, _ in times):9.3f}")
        print(f"images, ratio {statistics.median(a / b for (a, _), (b, _) in pairs):19.1f}")


def columns(
    pairs: list[tuple[tuple[float, float], tuple[float, float]]], *, inside_known: bool
) -> list[tuple[float, float]]:
    """(ms, ratio to the reference) of the step, and of its part outside the model where that can be told apart."""
    return [
        (
            1e3 * statistics.median(variant[part] for _, variant in pairs),
            statistics.median(reference[part] / variant[part] for reference, variant in pairs),
        )
        for part in ((0, 1) if inside_known else (0,))
    ]


if __name__ == "__main__":
    main()
