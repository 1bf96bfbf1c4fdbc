"""Bits/dim of a stock `DDPMPipeline`, trained on the 8x8 digits with Diffusers' own loop: its scheduler, its loss, no
line of ours.

python examples/stock_ddpm.py [--steps 2000]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits
from tqdm.auto import tqdm

from vdm_diffusers import evaluate_likelihood


def train(images: torch.Tensor, steps: int, seed: int = 0) -> DDPMPipeline:
    """The loop of Diffusers' tutorial: noise by `add_noise`, mean squared error of the noise, AdamW with a cosine
    schedule.
    """
    torch.manual_seed(seed)
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    clean = images.float() / 16 * 2 - 1  # what ToTensor and Normalize([0.5], [0.5]) do to 17 levels
    for _ in tqdm(range(steps)):
        batch = clean[torch.randint(len(clean), (64,))]
        noise = torch.randn_like(batch)
        timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(batch),))
        noisy = noise_scheduler.add_noise(batch, noise, timesteps)
        loss = F.mse_loss(model(noisy, timesteps).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
    return DDPMPipeline(model, noise_scheduler)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="of training")
    parser.add_argument("--num_images", type=int, default=200, help="held out and evaluated")
    arguments = parser.parse_args(argv)
    images = torch.from_numpy(load_digits().images).to(torch.uint8)[:, None]
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    pipe = train(images[arguments.num_images :], arguments.steps)

    generator = torch.Generator().manual_seed(0)
    report = evaluate_likelihood(pipe, images[: arguments.num_images], num_levels=17, generator=generator)
    print(f"{report.bits_per_dim:.3f} +- {report.standard_error:.3f} bits/dim")


if __name__ == "__main__":
    main()
