"""Memory and speed of a training step against the number of pixels and of weights, and what follows for many GPUs.

    python benchmarks/scaling.py                              # measures on the GPU, or on the CPU in a few minutes
    python benchmarks/scaling.py --write docs/scaling.md      # and writes its tables into the page

Counted on tensors without content, so exactly and at any size: weights; floating-point operations of matrix products
and convolutions, forward and backward (torch.utils.flop_counter); bytes of the tensors that autograd keeps for the
backward pass, each storage once. Measured: the time of a step, forward, backward and fused AdamW, and the rate of a
large matrix product on the same device; on a GPU also the most memory that was allocated. The extrapolation is
arithmetic on these with the assumptions in `Machine`; it is no measurement.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vdm_diffusers import VDMUNet2DModel

RECIPES = Path(__file__).resolve().parents[1] / "training" / "recipes"
BEGIN, END = "<!-- begin: benchmarks/scaling.py -->", "<!-- end: benchmarks/scaling.py -->"
STATE_BYTES = 20  # of a weight in float32: itself, its gradient, AdamW's two moments, its average


@dataclass(frozen=True)
class Machine:
    """What is assumed of the GPUs: the data sheet of an H100 SXM with NVLink, and 400 Gbit/s for each GPU between
    machines.

    Attributes:
        peak: matrix products in bf16, without sparsity, FLOP/s.
        share: of it that a training step reaches: an assumption, and the one that matters most.
        link, network: bytes/s that a GPU sends within a machine and between machines.
        memory: bytes.
        gpus: of one machine.
    """

    peak: float = 989e12
    share: float = 0.3
    link: float = 450e9
    network: float = 50e9
    memory: float = 80e9
    gpus: int = 8


@dataclass(frozen=True)
class Cost:
    """What one training image costs, and the network.

    Attributes:
        flops: forward and backward pass. saved_bytes: kept between them, in float32.
    """

    weights: int
    flops: float
    saved_bytes: float


@dataclass(frozen=True)
class Estimate:
    """A step on many GPUs: see `extrapolate`."""

    compute_seconds: float
    exchange_seconds: float
    state_bytes: float
    activation_bytes: float

    @property
    def seconds(self) -> float:
        """Of a step, if nothing is exchanged during computation: the pessimistic end."""
        return self.compute_seconds + self.exchange_seconds


def inputs(network: nn.Module, batch: int, size: int, channels: int, device: torch.device | str) -> dict[str, Tensor]:
    """What a network is called with."""
    sample = torch.randn(batch, channels, size, size, device=device)
    if isinstance(network, DiTTransformer2DModel):
        zeros = torch.zeros(batch, dtype=torch.long, device=device)
        return {"hidden_states": sample, "timestep": zeros, "class_labels": zeros}
    return {"sample": sample, "timestep": torch.zeros(batch, device=device)}


def cost(make: Callable[[], nn.Module], size: int, channels: int, *, gradient_checkpointing: bool = False) -> Cost:
    """Counted for one image, on tensors that have shapes and no content."""
    with FakeTensorMode():
        return _cost(make().train(), size, channels, gradient_checkpointing)


def _cost(network: nn.Module, size: int, channels: int, gradient_checkpointing: bool) -> Cost:
    if gradient_checkpointing:
        network.enable_gradient_checkpointing()
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
            kept.append(storage)  # an address that is freed could come again
        return tensor

    kept: list[torch.UntypedStorage] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(**inputs(network, 1, size, channels, "cpu"), return_dict=False)
    # of the kernels of attention, the one of plain matrix products is counted on every device
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = network(**inputs(network, 1, size, channels, "cpu"), return_dict=False)[0]
        output.float().square().mean().backward()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Cost(parameters, counter.get_total_flops(), sum(saved.values()))


def extrapolate(cost: Cost, machine: Machine, *, num_gpus: int, images_per_gpu: int, divided: bool) -> Estimate:
    """Time and memory of a step in bf16 autocast: arithmetic, with what `machine` assumes.

    A ring sends 2 (N - 1) / N of the gradients (DDP), or 3 (N - 1) / N of as many bytes (FSDP2: weights gathered
    twice, gradients scattered once), at the slowest link's rate. Saved activations are taken as half of float32's; the
    largest unit gathered at once, and what the allocator loses, are left out.
    """
    rate = machine.link if num_gpus <= machine.gpus else machine.network
    sent = (3 if divided else 2) * (num_gpus - 1) / num_gpus * 4 * cost.weights
    return Estimate(
        compute_seconds=images_per_gpu * cost.flops / (machine.share * machine.peak),
        exchange_seconds=sent / rate,
        state_bytes=STATE_BYTES * cost.weights / (num_gpus if divided else 1),
        activation_bytes=images_per_gpu * cost.saved_bytes / 2,
    )


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the device's measured peak."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(10))


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds; on a CPU processor time, which other work on the machine does not lengthen."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def measure(
    network: nn.Module, batch: int, size: int, channels: int, device: torch.device, bf16: bool
) -> tuple[float, float]:
    """Seconds of a step (median of 5 after 2), and the most bytes allocated (0 on a CPU)."""
    network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    given = inputs(network, batch, size, channels, device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = network(**given, return_dict=False)[0]
        output.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(timed(step, device) for _ in range(5))
    return seconds, torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def vdm(width: int, depth: int, size: int, attention: bool = True) -> Callable[[], nn.Module]:
    """VDM's network for colour images."""
    return lambda: VDMUNet2DModel(
        sample_size=size,
        hidden_channels=width,
        layers_per_block=depth,
        norm_num_groups=8,
        add_attention=attention,
        dropout=0.0,
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def measured_tables(device: torch.device, bf16: bool) -> str:
    """Speed against pixels at one network, and against weights at one size."""
    peak = matmul_rate(device, torch.bfloat16 if bf16 else torch.float32)
    gpu = device.type == "cuda"
    batch = 64 if gpu else 4
    sizes = [(128, 8, size) for size in (16, 32, 64)] if gpu else [(32, 2, size) for size in (8, 16, 32, 64)]
    widths = (
        [(width, 8, 32) for width in (64, 128, 256, 384)] if gpu else [(width, 2, 16) for width in (16, 32, 64, 128)]
    )
    header = [
        "weights",
        "pixels",
        "GFLOP an image",
        "kept an image, MB",
        "ms a step",
        "share of the matrix product's rate",
    ]
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} thread(s)"
    parts = [
        f"{name}, torch {torch.__version__}, {'bf16 autocast' if bf16 else 'float32'}, {batch} images a step; a large "
        "matrix product runs at "
        f"{peak / 1e9:.0f} GFLOP/s. VDM's network, its attention in the middle over all pixels."
    ]
    for title, shapes in (("More pixels", sizes), ("More weights", widths)):
        rows = []
        for width, depth, size in shapes:
            make = vdm(width, depth, size)
            counted = cost(make, size, 3)
            seconds, allocated = measure(make(), batch, size, 3, device, bf16)
            row = [
                f"{counted.weights / 1e6:.2f}M",
                f"{size}x{size}",
                f"{counted.flops / 1e9:.2f}",
                f"{counted.saved_bytes / 1e6:.1f}",
                f"{1e3 * seconds:.1f}",
                f"{batch * counted.flops / seconds / peak:.2f}",
            ]
            rows.append([*row, f"{allocated / 1e9:.2f}"] if gpu else row)
        parts.append(f"{title}:\n\n" + table([*header, "GB allocated"] if gpu else header, rows))
    return "\n\n".join(parts)


def extrapolated_table(machine: Machine) -> str:
    """ImageNet-64 by its recipe, and 256-pixel latents (32x32x4), on 8 and 64 GPUs."""
    recipe = yaml.safe_load((RECIPES / "imagenet64.yaml").read_text(encoding="utf-8"))
    width, depth = recipe["hidden_channels"], recipe["layers_per_block"]
    batch = 8 * recipe["train_batch_size"]
    jobs = [
        # name, network, size, channels, global batch, steps
        ("ImageNet-64, `imagenet64.yaml`", vdm(width, depth, 64, recipe["add_attention"]), 64, 3, batch, recipe["max_train_steps"]),
        ("256 px latents, DiT-XL/2", lambda: DiTTransformer2DModel(sample_size=32, out_channels=4), 32, 4, 256, 400_000),
    ]  # fmt: skip
    rows = []
    for name, make, size, channels, batch, steps in jobs:
        for checkpointing in (False, True):
            counted = cost(make, size, channels, gradient_checkpointing=checkpointing)
            for num_gpus in (8, 64):
                for divided in (False, True):
                    if divided == (not checkpointing):  # the two ends: nothing saved, and everything
                        continue
                    estimate = extrapolate(
                        counted, machine, num_gpus=num_gpus, images_per_gpu=batch // num_gpus, divided=divided
                    )
                    total = estimate.state_bytes + estimate.activation_bytes
                    rows.append(
                        [
                            name,
                            f"{counted.weights / 1e6:.0f}M",
                            f"{num_gpus}",
                            "FSDP2, checkpointed" if divided else "DDP",
                            f"{counted.flops / 1e9:.0f}",
                            f"{1e3 * estimate.compute_seconds:.0f} + {1e3 * estimate.exchange_seconds:.0f}",
                            f"{batch / estimate.seconds:.0f}",
                            f"{steps * estimate.seconds / 86400:.1f}",
                            f"{estimate.state_bytes / 1e9:.1f} + {estimate.activation_bytes / 1e9:.1f}{'' if total < machine.memory else ' (too much)'}",
                        ]
                    )
    header = ["job", "weights", "GPUs", "how", "GFLOP an image", "ms a step: computing + exchanging", "images/s", "days", "GB of a GPU: states + activations"]  # fmt: skip
    return (
        f"Assumed: {machine.peak / 1e12:.0f} TFLOP/s (H100, bf16), of which a step reaches {machine.share:.0%}; "
        f"{machine.link / 1e9:.0f} GB/s within "
        f"a machine of {machine.gpus}, {machine.network / 1e9:.0f} GB/s for each GPU between machines; nothing "
        "exchanged while computing; the recipe's global batch (128) "
        f"and {recipe['max_train_steps'] / 1e6:.0f} million steps for ImageNet-64, 256 images and 400 000 steps for "
        "the latents; float32 states, activations in half the "
        f"bytes of float32.\n\n{table(header, rows)}"
    )


def recipes_table(machine: Machine) -> str:
    """What the CIFAR-10 recipes cost, each on the GPUs that its batch is written for, by the same assumptions."""
    rows = []
    for name, num_gpus in (("cifar10-vdm-small", 1), ("cifar10-ddpm", 1), ("cifar10-vdm-paper", 8)):
        recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
        make = vdm(recipe["hidden_channels"], recipe["layers_per_block"], 32, recipe.get("add_attention", True))
        counted, images = cost(make, 32, 3), recipe["train_batch_size"]
        estimate = extrapolate(counted, machine, num_gpus=num_gpus, images_per_gpu=images, divided=False)
        hours = recipe["max_train_steps"] * estimate.seconds / 3600
        rows.append(
            [
                f"`{name}.yaml`",
                f"{counted.weights / 1e6:.0f}M",
                f"{num_gpus}",
                f"{counted.flops / 1e9:.0f}",
                f"{1e3 * estimate.seconds:.0f}",
                f"{hours:.1f} hours",
                f"{(estimate.state_bytes + estimate.activation_bytes) / 1e9:.0f}",
            ]
        )
    header = ["recipe", "weights", "GPUs", "GFLOP an image", "ms a step", "all steps", "GB of a GPU"]
    return f"The CIFAR-10 recipes by the same assumptions, DDP:\n\n{table(header, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bf16", action="store_true", help="measure under bf16 autocast")
    parser.add_argument("--share", type=float, default=Machine.share, help="assumed share of the peak")
    parser.add_argument("--write", type=Path, help="page whose marked part the tables replace")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = (
        f"## Measured\n\n{measured_tables(device, options.bf16)}\n\n## Extrapolated\n\n"
        f"{extrapolated_table(Machine(share=options.share))}\n\n{recipes_table(Machine(share=options.share))}"
    )
    print(text)
    if options.write is not None:
        before, rest = options.write.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        options.write.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
