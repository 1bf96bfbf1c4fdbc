"""Names of files and folders of a run, and its limits."""

from __future__ import annotations

import errno

from arguments import ARGUMENTS_FILE

EXIT_FAILED = 1
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
EXIT_BAD_INPUT = 2
STATE_FOLDER = "training_state"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FOLDER = "samples"
SAMPLES_FILE = "samples.png"
MODEL_NAMES = {
    "vdm": "variational diffusion model",
    "vae": "variational autoencoder",
    "hvae": "Markovian hierarchical variational autoencoder",
    "latent_vdm": "variational autoencoder with a variational diffusion model as its prior, a model",
}
PICTURES = {
    SAMPLES_FILE: "Samples, drawn in {steps} steps, not selected.",
    "reconstructions.png": "Held-out images, and below each row what encoder and decoder make of it.",
    "traversal.png": "One held-out image; in each row one latent from -3 to 3 standard deviations of the prior.",
    "interpolations.png": "In each row from one held-out image to another through the latents.",
}
BEST_FOLDER = "best"
OWN_FILES = (
    *("model_index.json", "unet", "scheduler", "README.md"),
    *("config.json", "diffusion_pytorch_model.safetensors"),
    *(ARGUMENTS_FILE, METRICS_FILE, SAMPLES_FOLDER, "vae", "vdm_diffusers.py", BEST_FOLDER, *PICTURES),
)
NUM_BINS = 16  # of log SNR, for the loss by log SNR
BATCHES_HELD = 64  # micro-batches whose losses are summed up at once
BYTES_KEPT_ON_DEVICE = 2 << 30  # data sets up to this size live on the accelerator
