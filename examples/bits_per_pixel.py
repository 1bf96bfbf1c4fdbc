"""Where the bits are: a map of the diffusion loss and the reconstruction over the pixels of an image.

The bound is a sum over pixels: 1/2 integral of |eps - eps_hat|^2 over log SNR is one for each of them. (How a pixel's
share depends on its neighbours is the model's business: shares add up to the image's bits, they are not likelihoods of
single pixels.)

    python examples/bits_per_pixel.py [--checkpoint model_cards/digits-elbo] --output bits_per_pixel.png
"""

from __future__ import annotations

import argparse
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits

from vdm_diffusers import VDMPipeline
from vdm_diffusers.decoders import encode_pixels
from vdm_diffusers.gaussian import diffuse
from vdm_diffusers.likelihood import expected_softmax_nats
from vdm_diffusers.prediction import convert
from vdm_diffusers.time_sampling import fold, low_discrepancy


@torch.no_grad()
def bits_per_pixel(pipeline: VDMPipeline, images: torch.Tensor, num_samples: int = 256) -> torch.Tensor:
    """Bits of every pixel of integer images (N, C, H, W), without the prior's: the average over `num_samples` noise
    levels.
    """
    config, schedule = pipeline.config, pipeline.scheduler.noise_schedule
    x = encode_pixels(images, config.num_levels, config.pixel_encoding)
    width = schedule.log_snr_max - schedule.log_snr_min
    nats = expected_softmax_nats(schedule.log_snr_max, config.num_levels, config.pixel_encoding)[images.long()]
    generator = torch.Generator().manual_seed(0)
    for u in fold(low_discrepancy(num_samples, generator=generator)):
        log_snr = schedule.log_snr_max - u * width
        noise = torch.randn(x.shape, generator=generator)
        z_t = diffuse(x, noise, log_snr)
        timestep = pipeline.scheduler.timestep_from_log_snr(log_snr).float().expand(len(x))
        output = pipeline.unet(z_t, timestep).sample
        eps_hat = convert(output, z_t, log_snr, source=pipeline.scheduler.config.prediction_type, target="epsilon")
        nats = nats + 0.5 * width * (noise - eps_hat).double() ** 2 / num_samples
    return nats / math.log(2)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="model_cards/digits-elbo", help="a pipeline of the 8x8 digits")
    parser.add_argument("--num_images", type=int, default=8)
    parser.add_argument("--output", default="bits_per_pixel.png")
    arguments = parser.parse_args(argv)
    pipeline = VDMPipeline.from_pretrained(arguments.checkpoint)
    test = np.random.default_rng(0).permutation(1797)[1500:]  # the split that training/train.py never looks at
    images = torch.from_numpy(load_digits().images[test]).to(torch.uint8)[: arguments.num_images, None]
    bits = bits_per_pixel(pipeline, images)
    figure, axes = plt.subplots(2, len(images), figsize=(1.5 * len(images), 3.4), squeeze=False)
    for image, share, (above, below) in zip(images, bits, axes.T, strict=True):
        above.imshow(image[0], cmap="gray")
        shown = below.imshow(share[0], cmap="magma", vmin=0, vmax=float(bits.max()))
        above.set_title(f"{float(share.mean()):.2f} bits/dim", fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.colorbar(shown, ax=axes, label="bits")
    figure.savefig(arguments.output, dpi=150)
    print(f"wrote {arguments.output}: {float(bits.mean()):.3f} bits/dim on average")


if __name__ == "__main__":
    main()
