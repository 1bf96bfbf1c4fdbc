"""Muon with AdamW: the maintained optimisers' own steps, on a network's mixed weights; states that resume exactly."""

import copy

import optimizers
import pytest
import torch
from torch import nn

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
SETTINGS = {"betas": (0.9, 0.99), "weight_decay": 0.03, "eps": 1e-8, "fused": False}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 18, 3, padding=1),
        nn.SiLU(),
        nn.GroupNorm(2, 18),
        nn.Conv2d(18, 20, 3),
        nn.Flatten(),
        nn.Linear(20 * 9, 2),
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(7, 3, 5, 5, generator=generator)
        (model(x) - x.mean((2, 3))[:, :2]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_matrices_get_muons_step_and_the_rest_adamws():
    model, reference = network(), network()
    optimizer = optimizers.make_optimizer("muon", model.named_parameters(), lr=0.02, **SETTINGS)
    matrices = [p for p in reference.parameters() if p.ndim == 4]
    assert sum(map(len, optimizer.stacks)) == len(matrices)  # the kernels, and not the (2, 180) output
    flat = [nn.Parameter(p.detach().reshape(p.shape[0], -1).clone()) for p in matrices]
    muon = torch.optim.Muon(flat, lr=0.02, weight_decay=0.03, adjust_lr_fn="match_rms_adamw")
    rest = [p for p in reference.parameters() if p.ndim != 4]
    adamw = torch.optim.AdamW(rest, lr=0.02, **SETTINGS)
    for step in range(4):
        x = torch.randn(7, 3, 5, 5, generator=torch.Generator().manual_seed(step))
        (reference(x) - x.mean((2, 3))[:, :2]).square().mean().backward()
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            ours.grad = theirs.grad.clone()  # the same gradients, so that roundings do not feed back
        for p, f in zip(matrices, flat, strict=True):
            f.grad = p.grad.reshape(f.shape)
        muon.step()
        adamw.step()
        optimizer.step()
        for p, f in zip(matrices, flat, strict=True):
            p.data = f.detach().reshape(p.shape).clone()
        reference.zero_grad()
    for ours, theirs, start in zip(model.parameters(), reference.parameters(), network().parameters(), strict=True):
        if ours.ndim == 4:  # torch's Muon iterates in bfloat16, which is worth some hundredths of the way
            assert (ours - theirs).norm() < 0.1 * (theirs - start).norm()
        else:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


def test_orthogonalized_matrices_keep_their_directions():
    matrices = torch.randn(3, 20, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for result, matrix in (
        (optimizers.orthogonalize(matrices), matrices),
        (optimizers.orthogonalize(matrices.mT), matrices.mT),
    ):
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        inner = u.mT @ result @ v.mT  # in the matrix's own directions: diagonal, about 1
        diagonal = inner.diagonal(dim1=1, dim2=2)
        assert (inner - torch.diag_embed(diagonal)).abs().max() < 1e-5
        assert ((diagonal > 0.6) & (diagonal < 1.3)).all()


def test_channels_last_weights_take_the_same_steps():
    model, other = network(), network().to(memory_format=torch.channels_last)
    for m in (model, other):
        train(m, optimizers.make_optimizer("muon", m.named_parameters(), lr=0.01, **SETTINGS), range(3))
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_resumed_from_the_state_is_the_same_run(name, fused, tmp_path):
    model, settings = network(), SETTINGS | {"fused": fused}
    optimizer = optimizers.make_optimizer(name, model.named_parameters(), lr=0.01, **settings)
    train(model, optimizer, range(3))
    weights = copy.deepcopy(model.state_dict())
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    train(model, optimizer, range(3, 6))

    resumed = network(seed=1)
    resumed.load_state_dict(weights)
    optimizer = optimizers.make_optimizer(name, resumed.named_parameters(), lr=0.01, **settings)
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(resumed, optimizer, range(3, 6))
    for ours, theirs in zip(model.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_fused_adamw_takes_pytorchs_steps():
    """With weights that a stage of the training does not reach, and a state that each may read of the other."""
    ours, theirs = network(), network()
    settings = {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 0.03, "eps": 1e-8}
    optimizer = optimizers.FusedAdamW(ours.parameters(), **settings)
    reference = torch.optim.AdamW(theirs.parameters(), **settings, fused=True)
    for step in range(12):
        if step == 8:
            state, other = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(reference.state_dict())
            optimizer.load_state_dict(other)
            reference.load_state_dict(state)
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = 0.02 / (1 + step)
        generator = torch.Generator().manual_seed(step)
        for index, (p, q) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
            p.grad = torch.randn(p.shape, generator=generator) if index or step not in (0, 1, 5) else None
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        reference.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q)
    counts = {index: float(entry["step"]) for index, entry in optimizer.state_dict()["state"].items()}
    assert counts == {index: 9 if index == 0 else 12 for index in range(len(counts))}


@pytest.mark.parametrize("limit", [0.5, 1e6, float("inf")])
def test_clipping_is_pytorchs(limit):
    ours, theirs = network(), network()
    for index, (p, q) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
        if index:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(index))
            q.grad = p.grad.clone()
    norm = optimizers.clip_gradients(list(ours.parameters()), limit)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit))
    for p, q in zip(list(ours.parameters())[1:], list(theirs.parameters())[1:], strict=True):
        assert torch.equal(p.grad, q.grad)


def test_the_learning_rate_of_every_group_can_be_set_after_loading():
    model = network()
    optimizer = optimizers.make_optimizer("muon", model.named_parameters(), lr=0.01, **SETTINGS)
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(1))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_network_without_matrices_is_refused():
    with pytest.raises(ValueError, match="--optimizer adamw"):
        optimizers.make_optimizer("muon", nn.Linear(3, 2).named_parameters(), lr=0.01, **SETTINGS)
