"""What does a step cost? VDMScheduler and VDMFlowScheduler against four of Diffusers' schedulers, on the CPU.

The schedulers take turns, block by block, so that other work on the machine meets all of them alike; times are medians
of blocks of 49 steps, ratios are medians of the ratios within a round. Kernels are the operations that touch a tensor
of the sample's size, what a GPU would launch (tables on the CPU, as they are at first). Synchronisations are the
values that a step reads from the timestep's tensor: each waits for a GPU if the timestep lies there.

    python benchmarks/scheduler_step.py               # the tables of docs/scheduler.md
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import time

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch.utils._python_dispatch import TorchDispatchMode

from vdm_diffusers import VDMFlowScheduler, VDMScheduler

SHAPES = [(1, 1, 1, 2), (1, 3, 32, 32), (1, 4, 64, 64), (16, 3, 32, 32), (4, 4, 128, 128)]
SCHEDULERS = {
    "VDMScheduler": (VDMScheduler, {}),
    "DDPMScheduler": (DDPMScheduler, {}),
    "VDMScheduler, stochasticity 0": (VDMScheduler, {"stochasticity": 0.0}),
    "DDIMScheduler": (DDIMScheduler, {}),
    "VDMScheduler 2M": (VDMScheduler, {"stochasticity": 0.0, "multistep_order": 2, "clip_sample": False}),
    "DPMSolverMultistepScheduler": (DPMSolverMultistepScheduler, {}),
    "VDMFlowScheduler": (VDMFlowScheduler, {}),
    "FlowMatchEulerDiscreteScheduler": (FlowMatchEulerDiscreteScheduler, {}),
}
PAIRS = [
    ("DDPMScheduler", "VDMScheduler"),
    ("DDIMScheduler", "VDMScheduler, stochasticity 0"),
    ("DPMSolverMultistepScheduler", "VDMScheduler 2M"),
    ("FlowMatchEulerDiscreteScheduler", "VDMFlowScheduler"),
]
VIEWS = {
    "view",
    "slice",
    "select",
    "alias",
    "detach",
    "expand",
    "split",
    "unsqueeze",
    "unbind",
    "as_strided",
    "lift_fresh",
}


def block(scheduler, output: torch.Tensor, sample: torch.Tensor) -> float:
    """Seconds a step, over the 49 steps of a grid of 50 that all have a successor."""
    scheduler.set_timesteps(50)
    timesteps = list(scheduler.timesteps)[:49]
    start = time.perf_counter()
    for t in timesteps:
        scheduler.step(output, t, sample, return_dict=False)  # as most pipelines call it
    return (time.perf_counter() - start) / len(timesteps)


def times(shape: tuple[int, ...], rounds: int) -> dict[str, list[float]]:
    output, sample = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    schedulers = {name: make(**config) for name, (make, config) in SCHEDULERS.items()}
    for scheduler in schedulers.values():
        block(scheduler, output, sample)
    result: dict[str, list[float]] = {name: [] for name in schedulers}
    for _ in range(rounds):
        for name, scheduler in schedulers.items():
            result[name].append(block(scheduler, output, sample))
    return result


class Counter(TorchDispatchMode):
    def __init__(self, size: int):
        super().__init__()
        self.size, self.kernels, self.reads = size, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        big = any(isinstance(v, torch.Tensor) and v.numel() == self.size for v in (*args, out))
        self.kernels += big and name not in VIEWS
        self.reads += name == "_local_scalar_dense"
        return out


def count(name: str) -> tuple[int, int | str]:
    """Kernels of one step, and the times that it reads its timestep."""
    make, config = SCHEDULERS[name]
    output, sample = torch.randn(2, 2, 3, 32, 32)
    scheduler = make(**config)
    scheduler.set_timesteps(50)
    for t in scheduler.timesteps[:10]:  # past the first steps of multistep samplers
        with Counter(sample.numel()) as counter:
            scheduler.step(output, t, sample)
    if make not in (VDMScheduler, VDMFlowScheduler):
        return counter.kernels, counter.reads
    # On the CPU ours looks its timestep up; on a device it does not. The meta device proves it: its values cannot be
    # read.
    scheduler.set_timesteps(50, device="meta")
    output, sample = output.to("meta"), sample.to("meta")
    for t in scheduler.timesteps:
        scheduler.step(output, t, sample)
    return counter.kernels, 0


def float32_error(make) -> float:
    """Largest error of a float32 step of the training chain, against float64 from the same inputs; the data are in
    [-1, 1].
    """
    scheduler, exact = make(), VDMScheduler()
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for t in range(999, -1, -1):
        x, noise = (
            2 * torch.rand(1, 3, 16, 16, generator=generator) - 1,
            torch.randn(1, 3, 16, 16, generator=generator),
        )
        z = exact.add_noise(x, noise, torch.tensor([t]))
        kwargs = (
            {"generator": torch.manual_seed(0)} if "generator" in inspect.signature(scheduler.step).parameters else {}
        )
        prev_sample = scheduler.step(noise, t, z, **kwargs).prev_sample
        x_hat = exact.convert_prediction(noise.double(), t, z.double(), target="sample").clamp(-1, 1)
        mean, variance = exact.posterior_mean_variance(z.double(), x_hat, t)
        drawn = torch.randn(noise.shape, generator=torch.manual_seed(0)).double()
        worst = max(worst, float((prev_sample.double() - mean - variance.sqrt() * drawn).abs().max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    print("| shape | " + " | ".join(f"{p} us | {o} us | ratio" for p, o in PAIRS) + " |")
    print("|---" * (1 + 3 * len(PAIRS)) + "|")
    for shape in SHAPES:
        result = times(shape, arguments.rounds)
        cells = []
        for peer, ours in PAIRS:
            ratio = statistics.median(p / o for p, o in zip(result[peer], result[ours], strict=True))
            cells += [f"{1e6 * statistics.median(result[name]):.0f}" for name in (peer, ours)] + [f"**{ratio:.2f}**"]
        print(f"| {shape} | " + " | ".join(cells) + " |", flush=True)

    print("\n| scheduler | kernels a step | synchronisations a step, timestep on the GPU |\n|---|---|---|")
    for name in SCHEDULERS:
        print(f"| {name} | {' | '.join(map(str, count(name)))} |")
    print("\n| float32 step, largest error on the training chain | |\n|---|---|")
    for make in (VDMScheduler, DDPMScheduler):
        print(f"| {make.__name__} | {float32_error(make):.1e} |")


if __name__ == "__main__":
    main()
