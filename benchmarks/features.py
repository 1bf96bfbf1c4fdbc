"""Likelihoods of vectors: a diffusion model beside the density estimators of scikit-learn, on two of its tables.

Breast cancer (569 rows of 30 numbers) and wine (178 rows of 13), standardised. Each model is fitted to 70% of one
class (benign; the second cultivar), and says -ln p of the others of this class (nats for each number; less is better)
and how well that tells them from the other classes (area under the ROC curve). Averages over the seeds, each with a
split of its own.

    python benchmarks/features.py [--steps 3000] [--seeds 3] [--output features.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KernelDensity
from torch import Tensor
from tqdm.auto import tqdm

from vdm_diffusers import VDMMLPModel, VDMScheduler, evaluate_likelihood
from vdm_diffusers.elbo import continuous_weight
from vdm_diffusers.gaussian import diffuse
from vdm_diffusers.objectives import diffusion_loss
from vdm_diffusers.time_sampling import low_discrepancy

TABLES = {"breast cancer": (load_breast_cancer, 1), "wine": (load_wine, 1)}
ENDS = {"log_snr_max": 4.0, "log_snr_min": -6.0}  # noise of 0.14 standard deviations: so few rows say no more


def split(name: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Training rows, held-out rows of the same class, rows of other classes; standardised by the first."""
    load, kind = TABLES[name]
    x, y = load(return_X_y=True)
    inside = np.random.default_rng(seed).permutation(np.flatnonzero(y == kind))
    cut = int(0.7 * len(inside))
    mean, deviation = x[inside[:cut]].mean(0), x[inside[:cut]].std(0)
    scaled = torch.from_numpy((x - mean) / deviation).float()
    return scaled[inside[:cut]], scaled[inside[cut:]], scaled[torch.from_numpy(y != kind)]


def train(x: Tensor, steps: int, seed: int) -> tuple[VDMMLPModel, VDMScheduler]:
    """A small network by the bound, its weights averaged over the second half of training."""
    torch.manual_seed(seed)
    scheduler = VDMScheduler(beta_schedule="log_snr_linear", **ENDS)
    network = VDMMLPModel(in_channels=x.shape[1], hidden_channels=64, num_layers=2, dropout=0.3)
    average = torch.optim.swa_utils.AveragedModel(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    schedule, T = scheduler.noise_schedule, scheduler.config.num_train_timesteps
    for step in range(steps):
        rows = x[torch.randint(len(x), (128,))]
        t, noise = low_discrepancy(len(rows)), torch.randn(len(rows), x.shape[1])
        log_snr = schedule.log_snr(t)
        output = network(diffuse(rows, noise, log_snr), T * t - 1).sample
        weight = continuous_weight(schedule.derivative(t))
        loss = diffusion_loss(output, rows, noise, log_snr, prediction_type="epsilon", elbo_weight=weight).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if step > steps // 2:
            average.update_parameters(network)
    return average.module.eval(), scheduler


def nats_of(name: str, x: Tensor, steps: int, seed: int) -> Any:
    """A function of rows that returns their -ln p (of IsolationForest: a score without unit)."""
    rows = x.numpy()
    if name == "VDMMLPModel":
        network, scheduler = train(x, steps, seed)
        options: dict[str, Any] = {"num_levels": None, "num_samples": 64, "progress_bar": False, "generator": seed}
        return lambda other: evaluate_likelihood(network, other, scheduler=scheduler, **options).nats.numpy()
    if name == "GaussianMixture":
        grid = {"n_components": [1, 2, 3], "reg_covar": [1e-3, 1e-2, 1e-1]}
        model: Any = GridSearchCV(GaussianMixture(random_state=seed), grid).fit(rows)
        return lambda other: -model.best_estimator_.score_samples(other.numpy())
    if name == "KernelDensity":
        model = GridSearchCV(KernelDensity(), {"bandwidth": np.geomspace(0.1, 2, 12)}).fit(rows)
        return lambda other: -model.best_estimator_.score_samples(other.numpy())
    model = IsolationForest(random_state=seed).fit(rows)
    return lambda other: -model.score_samples(other.numpy())


def main() -> None:
    """Print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("features.json"))
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for table in TABLES:
        for name in tqdm(("VDMMLPModel", "GaussianMixture", "KernelDensity", "IsolationForest"), desc=table):
            nats, areas = [], []
            for seed in range(args.seeds):
                x, inside, outside = split(table, seed)
                score = nats_of(name, x, args.steps, seed)
                own, other = score(inside), score(outside)
                nats.append(float(own.mean()) / x.shape[1])
                areas.append(roc_auc_score(np.r_[np.zeros(len(own)), np.ones(len(other))], np.r_[own, other]))
            results.setdefault(table, {})[name] = {
                "nats": None if name == "IsolationForest" else float(np.mean(nats)),
                "auroc": float(np.mean(areas)),
            }
    for table, rows in results.items():
        print(f"\n{table}: {'':16} nats each   AUROC")
        for name, row in rows.items():
            nats_text = "      -" if row["nats"] is None else f"{row['nats']:7.3f}"
            print(f"  {name:28} {nats_text}    {row['auroc']:.4f}")
    args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
