#!/usr/bin/env python
"""Print the figures that a rebuilding of the code must not move, to the last digit; compare two checkouts.

    python scripts/same_figures.py --checkout ../before --out before.json
    python scripts/same_figures.py --checkout . --out after.json --against before.json

Samples of every mode of the scheduler, the bits/dim of the published models of `model_cards/`, and the losses of 50
training steps of each kind of model with one and with two processes. Each checkout's own code runs in a process of its
own. Exits with 1 if a figure of `--against` differs or is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PARTS = ("sampling", "cards", "training")
MODES = {
    "DDPM": {},
    "fixed_large": {"variance_type": "fixed_large"},
    "v_prediction, trailing": {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "sample, linspace": {"prediction_type": "sample", "timestep_spacing": "linspace"},
    "zero SNR": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "cosine betas": {"beta_schedule": "squaredcos_cap_v2"},
    "thresholding": {"thresholding": True},
    "DDIM": {"stochasticity": 0.0},
    "noisier": {"stochasticity": 1.5},
    "2M": {"stochasticity": 0.0, "multistep_order": 2},
    "2M, log-SNR grid": {"stochasticity": 0.0, "multistep_order": 2, "step_grid": "log_snr"},
    "learned_range": {"variance_type": "learned_range"},
    "log-SNR linear": {"beta_schedule": "log_snr_linear", "log_snr_max": 13.3, "log_snr_min": -5.0},
    "log-SNR cosine, mean": {
        "beta_schedule": "log_snr_cosine",
        "log_snr_max": 10.0,
        "log_snr_min": -10.0,
        "final_step": "mean",
        "log_snr_shift": -1.0,
    },
    "optimal": {
        "variance_type": "optimal",
        "optimal_variance": {"log_snr": [-9.0, 0.0, 9.0], "mse": [1.0, 0.3, 0.001]},
    },
}
STEPS = (7, 50)
MODELS = {
    "digits": "--hidden_channels 8 --layers_per_block 1 --attention_head_dim 8",
    "vae": "--model vae --block_out_channels 8 8 --latent_channels 2 --norm_num_groups 4",
    "hvae": "--model hvae --block_out_channels 8 8 --latent_channels 2 --norm_num_groups 4",
    "latent_vdm": "--model latent_vdm --block_out_channels 8 8 --latent_channels 2 --norm_num_groups 4 "
    "--hidden_channels 8 --layers_per_block 1 --attention_head_dim 8",
}
TRAINING = (
    "--max_train_steps 50 --train_batch_size 8 --optimizer adamw --learning_rate 1e-3 --lr_warmup_steps 5 "
    "--logging_steps 1 "
    "--eval_max_images 8 --eval_num_samples 4 --num_sample_images 4 --ddpm_num_inference_steps 5 "
    "--checkpointing_steps 1000 "
    "--logger none --mixed_precision no"
)


def sampling() -> dict[str, object]:
    """Mean, mean square and hash of what 7 and 50 steps of every mode draw, with a network that is a known
    function.
    """
    import hashlib

    import torch

    from vdm_diffusers import VDMScheduler

    found: dict[str, object] = {}
    for name, options in MODES.items():
        for steps in STEPS:
            scheduler = VDMScheduler(**options)
            scheduler.set_timesteps(steps)
            generator = torch.Generator().manual_seed(3)
            sample = torch.randn(2, 3, 5, 7, generator=generator)
            channels = 6 if options.get("variance_type") == "learned_range" else 3
            for t in scheduler.timesteps:
                output = torch.tanh(0.7 * sample + 0.001 * float(t)) * 0.9
                output = torch.cat([output, output.sin()], 1) if channels == 6 else output
                sample = scheduler.step(output, t, sample, generator=generator).prev_sample
            digest = hashlib.blake2b(sample.numpy().tobytes(), digest_size=8).hexdigest()
            found[f"sampling, {name}, {steps}"] = [float(sample.mean()), float(sample.square().mean()), digest]
    return found


def cards() -> dict[str, object]:
    """Bits/dim of a few images under each published model, by the methods that take seconds."""
    import numpy as np
    import torch
    from sklearn.datasets import load_digits

    from vdm_diffusers import VDMPipeline, evaluate_likelihood

    found: dict[str, object] = {}
    digits, labels = load_digits(return_X_y=True)
    digits = torch.from_numpy(digits[:16].astype(np.uint8)).reshape(16, 1, 8, 8)
    for folder in sorted(path.parent for path in Path("model_cards").glob("*/model_index.json")):
        pipe = VDMPipeline.from_pretrained(folder.resolve())
        pipe.set_progress_bar_config(disable=True)
        images = digits if folder.name.startswith("digits") else digits.repeat(1, 1, 4, 4)[:, :, 2:30, 2:30][:4] * 15
        given = {"class_labels": torch.from_numpy(labels[:16])} if folder.name.endswith("class") else {}
        for method, options in {"continuous": {}, "discrete": {"num_steps": 20}, "ode": {}}.items():
            if method == "ode" and folder.name != "digits-elbo":
                continue
            if method == "discrete":
                pipe.scheduler.register_to_config(stochasticity=1.0)
                pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
            count = {} if method == "ode" else {"num_samples": 16}
            chosen = slice(2 if method == "ode" else None)
            given = {name: value[chosen] for name, value in given.items()}
            report = evaluate_likelihood(
                pipe,
                images[chosen],
                method=method,
                generator=torch.Generator().manual_seed(1),
                **given,
                **count,
                **options,
            )
            found[f"card, {folder.name}, {method}"] = [report.bits_per_dim, report.standard_error]
    return found


def training(checkout: Path) -> dict[str, object]:
    """The losses of 50 steps of each model with one process and with two."""
    found: dict[str, object] = {}
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    for name, options in MODELS.items():
        for processes in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
                launcher += [f"--master_port={29500 + os.getpid() % 1000}"]
                command = launcher if processes > 1 else [sys.executable]
                command += ["training/train.py", "--output_dir", folder, *options.split(), *TRAINING.split()]
                done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
                lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                rows = [json.loads(line) for line in lines]
            losses = [row.get("loss", row.get("train/loss")) for row in rows if "loss" in row or "train/loss" in row]
            found[f"training, {name}, {processes} process(es)"] = losses
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=Path("."), help="the folder whose code runs")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file to write the figures to")
    parser.add_argument("--against", type=Path, help="the figures of another checkout to compare with")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--inner", choices=PARTS[:2], help=argparse.SUPPRESS)
    args = parser.parse_args()
    checkout = args.checkout.resolve()
    if args.inner:
        args.out.write_text(json.dumps({"sampling": sampling, "cards": cards}[args.inner]()), encoding="utf-8")
        return
    found: dict[str, object] = {}
    os.environ["PYTHONPATH"] = str(checkout / "src")
    for part in args.parts:
        if part == "training":
            found |= training(checkout)
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "figures.json"
            subprocess.run([sys.executable, __file__, "--inner", part, "--out", str(out)], cwd=checkout, check=True)
            found |= json.loads(out.read_text(encoding="utf-8"))
    args.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"{len(found)} figures of {checkout} written to {args.out}")
    if args.against:
        before = json.loads(args.against.read_text(encoding="utf-8"))
        different = [name for name, value in before.items() if name in found and found[name] != value]
        missing = [
            name
            for name in before
            if name not in found and name.split(",")[0].rstrip("s") in {part.rstrip("s") for part in args.parts}
        ]
        for name in different:
            print(f"differs: {name}\n  before {before[name]}\n  after  {found[name]}")
        for name in missing:
            print(f"missing: {name}")
        print(f"{len(before) - len(different) - len(missing)} of {len(before)} figures are the same to the last digit")
        sys.exit(bool(different or missing))


if __name__ == "__main__":
    main()
