"""The network of vectors: what a new one answers, what it learns, saving, refusals."""

import math

import pytest
import torch

from vdm_diffusers import VDMMLPModel, VDMScheduler, evaluate_likelihood
from vdm_diffusers.elbo import continuous_weight
from vdm_diffusers.gaussian import diffuse
from vdm_diffusers.objectives import diffusion_loss
from vdm_diffusers.time_sampling import low_discrepancy


def test_a_new_one_answers_with_its_input_and_saves(tmp_path):
    model = VDMMLPModel(5, hidden_channels=16, num_layers=2, num_class_embeds=3).eval()
    z, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    assert torch.equal(model(z, 10, class_labels=labels).sample, z)
    for layer in (model.linear_out, *(block.linear2 for block in model.blocks)):
        torch.nn.init.normal_(layer.weight)
    model.save_pretrained(tmp_path)
    again = VDMMLPModel.from_pretrained(tmp_path)
    time = torch.tensor([0.5, 3, 7, 999])
    assert torch.equal(model(z, time, class_labels=labels).sample, again(z, time, class_labels=labels).sample)
    assert not torch.equal(model(z, 10, class_labels=labels).sample, model(z, 900, class_labels=labels).sample)


def test_it_learns_the_density_of_correlated_vectors():
    """-ln p of a Gaussian of two strongly correlated pairs; a network that saw none of the correlation is far
    above.
    """
    torch.manual_seed(0)
    factor = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.3, 0, 0], [0, 0, 1.0, 0], [0, 0, -0.9, 0.3]])
    x = torch.randn(4096, 4) @ factor.T
    scheduler = VDMScheduler(beta_schedule="log_snr_linear", log_snr_max=8.0, log_snr_min=-6.0)
    schedule, model = scheduler.noise_schedule, VDMMLPModel(4, hidden_channels=64, num_layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(400):
        rows = x[torch.randint(len(x), (256,))]
        t, noise = low_discrepancy(len(rows)), torch.randn(len(rows), 4)
        log_snr = schedule.log_snr(t)
        output = model(diffuse(rows, noise, log_snr), 1000 * t - 1).sample
        loss = diffusion_loss(
            output,
            rows,
            noise,
            log_snr,
            prediction_type="epsilon",
            elbo_weight=continuous_weight(schedule.derivative(t)),
        )
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    test = torch.randn(500, 4) @ factor.T
    report = evaluate_likelihood(
        model.eval(), test, scheduler=scheduler, num_levels=None, num_samples=32, generator=0, progress_bar=False
    )
    covariance = factor @ factor.T
    entropy = (0.5 * torch.logdet(2 * math.pi * math.e * covariance) / 4).item()
    independent = (0.5 * (2 * math.pi * math.e * covariance.diagonal()).log().sum() / 4).item()
    assert entropy - 0.05 < report.nats_per_dim < entropy + 0.35 * (independent - entropy)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"in_channels": 0}, "`in_channels` must lie in"),
        ({"in_channels": 3, "hidden_channels": 2}, "to hold the sinusoids"),
        ({"in_channels": 3, "num_layers": 0}, "`num_layers` must lie in"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        VDMMLPModel(**options)


def test_samples_and_labels_that_do_not_fit_are_refused():
    model = VDMMLPModel(3, hidden_channels=8)
    with pytest.raises(ValueError, match=r"shape \(B, 3\)"):
        model(torch.randn(2, 4), 1)
    with pytest.raises(ValueError, match="not expected"):
        model(torch.randn(2, 3), 1, class_labels=torch.tensor([0, 1]))
