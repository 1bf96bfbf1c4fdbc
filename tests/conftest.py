"""Settings for the whole suite, made before anything of Hugging Face is imported; child processes inherit them."""

import os

# A test that needs the network is a test that fails on another machine: the Hub is out of reach, cache or not.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DIFFUSERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# The tensors here are small: more threads cost time, and the same count on every machine keeps rounding the same.
os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch

torch.set_num_threads(min(torch.get_num_threads(), int(os.environ["OMP_NUM_THREADS"])))
