"""Every scheduler class of Diffusers: its configuration and its objects are read right, or refused with the class
that is right.
"""

import inspect
import math
import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UnCLIPScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils import DummyObject

from vdm_diffusers import VDMFlowScheduler, VDMScheduler, VDMSigmaScheduler, evaluate_likelihood
from vdm_diffusers.evaluation.chains import adopt

NAMES = sorted(
    name
    for name in dir(diffusers)
    if name.endswith("Scheduler")
    and not name.startswith(("VDM", "Flax"))
    and not isinstance(getattr(diffusers, name), DummyObject)
)
FLOWS = ["FlowMatch", "FlowMap", "Helios", "Piflow", "MiniMaxH3", "LTXEulerAncestralRF"]
SIGMAS = ["EDM", "CosineDPMSolver", "KarrasVe", "ScoreSdeVe", "CMStochasticIterative"]
NEEDED = {
    "mask_token_id": 3,
    "num_vec_classes": 5,
    "schedule_mode": "log",
    "noise_mode": "log",
    "tsr_k": 1.0,
    "tsr_sigma": 1.0,
}
OTHER_VALUES = {
    "num_train_timesteps": 400,
    "beta_start": 0.0003,
    "beta_end": 0.017,
    "beta_schedule": "scaled_linear",
    "prediction_type": "sample",
    "timestep_spacing": "trailing",
    "snr_shift_scale": 2.0,
    "clip_sample_range": 1.5,
    "steps_offset": 1,
    "shift": 3.0,
    "sigma_max": 50.0,
}
CHANGES = {
    "defaults": {},
    "other values": OTHER_VALUES,
    "zero terminal SNR": {**OTHER_VALUES, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "betas": {"trained_betas": np.linspace(0.001, 0.05, 60).tolist(), "num_train_timesteps": 60},
    "Karras": {"use_karras_sigmas": True},
}
OWN = ["prediction_type", "clip_sample", "clip_sample_range", "thresholding"]


def build(name, changes):
    """The stock object, with those of the changes that its class takes."""
    cls = getattr(diffusers, name)
    parameters = inspect.signature(cls.__init__).parameters
    values = {k: v for k, v in {**NEEDED, **changes}.items() if k in parameters}
    if name == "UnCLIPScheduler":
        values.pop("beta_schedule", None)
        values.pop("prediction_type", None)
    return cls(**values)


def has_integer_timesteps(name):
    return "beta_schedule" in inspect.signature(getattr(diffusers, name).__init__).parameters


def check_table(ours, peer, *, guard):
    """Our log SNRs against the float32 product of the peer; `guard`: 2^-24 where a class must not have a zero at the
    end.
    """
    theirs, own = peer.alphas_cumprod.double(), torch.sigmoid(ours.log_snr(torch.arange(len(peer.alphas_cumprod))))
    assert ours.config.num_train_timesteps == len(theirs)
    steps = torch.arange(3, len(theirs) + 3)
    error = (theirs - own).abs() / (steps * own + 8 * own.sqrt() + (1.01 if guard else 1e-9))
    assert float(error.max()) <= 2.0**-24, (int(error.argmax()), float(error.max()) * 2**24)


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", NAMES)
def test_every_class_is_read_right_or_refused(name, changes, caplog):
    try:
        peer = build(name, changes)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        pytest.skip(f"{name} itself does not take these: {error}")
    if has_integer_timesteps(name):
        ours = VDMScheduler.from_config(peer.config)
        check_table(ours, peer, guard=changes.get("rescale_betas_zero_snr", False))
        for key in OWN:
            assert key not in peer.config or ours.config[key] == peer.config[key], key
        again = VDMScheduler.from_config(ours.config)
        assert torch.equal(again.log_snr(torch.arange(len(ours.betas))), ours.log_snr(torch.arange(len(ours.betas))))
        if "snr_shift_scale" in peer.config:  # and back
            back = type(peer).from_config(ours.config)
            torch.testing.assert_close(
                back.alphas_cumprod, peer.alphas_cumprod, rtol=1e-4, atol=1e-7, check_dtype=False
            )
        check_table(adopt(peer), peer, guard=False)  # what an evaluator takes is the object's own
        return
    ours = OURS.get(name)
    right = ours.__name__ if ours else name
    if ours:
        if peer.config.get("prediction_type") == "sample":  # which the peer takes, and refuses in its first step
            with pytest.raises(ValueError, match=f"keep {name}"):
                ours.from_config(peer.config)
            return
        if name == "FlowMatchHeunDiscreteScheduler":  # whose keys are those of another class too
            with pytest.raises(ValueError, match="FlowMapEulerDiscreteScheduler or FlowMatchHeunDiscreteScheduler"):
                ours.from_config(peer.config)
        else:
            check_other_path(ours.from_config(peer.config), peer)
        check_other_path(ours.from_config({**peer.config, "_class_name": name}), peer)
        assert adopt(peer).timeline.log_snr(adopt(peer).timeline.timestep(1.0)) == pytest.approx(1.0)
    else:
        with pytest.raises(ValueError, match=right):
            adopt(peer)
    says_whose = not peer.config.keys() <= inspect.signature(VDMScheduler.__init__).parameters.keys()
    if says_whose:
        with pytest.raises(ValueError, match="VDMFlowScheduler" if name.startswith("FlowMap") else right):
            VDMScheduler.from_config(peer.config).set_timesteps(5)
    with pytest.raises(ValueError, match=right):
        VDMScheduler.from_config({**peer.config, "_class_name": name}).log_snr(3)
    for cls in (VDMFlowScheduler, VDMSigmaScheduler):
        if cls is not ours:
            with pytest.raises(ValueError, match=right):
                cls.from_config({**peer.config, "_class_name": name})


OURS = {
    **dict.fromkeys(
        ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"],
        VDMFlowScheduler,
    ),
    **dict.fromkeys(["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"], VDMSigmaScheduler),
}


def check_other_path(ours, peer):
    """The same sigmas for the model's own steps, and the same words for what belongs to the model."""
    for key in ("num_train_timesteps", "shift", "sigma_min", "sigma_max", "sigma_data", "prediction_type"):
        assert key not in peer.config or ours.config[key] == peer.config[key], key
    if hasattr(ours, "shift"):
        torch.testing.assert_close(ours.sigmas, peer.sigmas[: len(ours.sigmas)], rtol=1e-6, atol=1e-7)
    else:
        assert float(ours.sigmas[0]) == pytest.approx(float(peer.sigmas[0]), rel=1e-4)
        assert ours.init_noise_sigma == peer.init_noise_sigma


@pytest.mark.parametrize("name", [name for name in NAMES if has_integer_timesteps(name)])
def test_a_table_is_refused_by_the_schedulers_of_other_paths(name):
    peer = build(name, {})
    for cls in (VDMFlowScheduler, VDMSigmaScheduler):
        with pytest.raises(ValueError, match=r"VDMScheduler|VDMFlowScheduler"):
            cls.from_config(peer.config)


@pytest.mark.parametrize("name", [name for name in NAMES if has_integer_timesteps(name)])
def test_a_table_that_was_assigned_is_the_one_that_counts(name):
    peer = build(name, {})
    assigned = 0.9 * peer.alphas_cumprod + 1e-4
    peer.alphas_cumprod = assigned
    table = torch.sigmoid(adopt(peer).timeline.entries)
    torch.testing.assert_close(table, assigned.double(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("cls", [LCMScheduler, UnCLIPScheduler, EulerDiscreteScheduler], ids=lambda c: c.__name__)
def test_the_bound_is_that_of_the_same_table_given_explicitly(cls):
    """The peers' from_config takes another table for it, in silence."""
    peer = cls()
    images = torch.randint(0, 256, (3, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    explicit = VDMScheduler(trained_betas=1 - peer.alphas.double(), num_train_timesteps=1000)

    def bound(scheduler):
        generator = torch.Generator().manual_seed(1)
        report = evaluate_likelihood(
            lambda z, t: 0.5 * z, images, scheduler=scheduler, generator=generator, num_samples=8, progress_bar=False
        )
        return report.bits_per_dim

    assert bound(peer) == pytest.approx(bound(explicit), rel=1e-4)
    assert bound(VDMScheduler.from_config(peer.config)) == pytest.approx(bound(explicit), rel=1e-4)
    config = DDPMScheduler.from_config(peer.config)
    differs = not torch.allclose(config.alphas_cumprod, peer.alphas_cumprod, rtol=1e-3)
    assert differs == (cls is not EulerDiscreteScheduler)


FLOW_SIGMAS = ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "SASolverScheduler"]


@pytest.mark.parametrize("name", FLOW_SIGMAS)
def test_flow_sigmas(name):
    peer = build(name, {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0})
    with pytest.raises(ValueError, match=r"flow path .* Use VDMFlowScheduler"):
        VDMScheduler.from_config(peer.config)
    ours = VDMFlowScheduler.from_config({**peer.config, "_class_name": name})
    for s in (peer, ours):
        s.set_timesteps(6, device="cpu") if s is peer else s.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6))
    assert ours.shift == 3.0 and ours.config.prediction_type == "flow_prediction"
    # the peer feeds its network whole numbers
    torch.testing.assert_close(ours.timesteps[1:], peer.timesteps[1:].float(), rtol=0.02, atol=1.0)
    assert type(adopt(peer)) is VDMFlowScheduler and adopt(peer).shift == 3.0


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        (lambda: UniPCMultistepScheduler(use_flow_sigmas=True), "use_flow_sigmas"),
        (lambda: EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"), r"0\.25 ln"),
    ],
)
def test_what_ddpm_takes_in_silence_warns_and_is_not_evaluated(peer, message):
    with pytest.warns(UserWarning, match=message):
        VDMScheduler.from_config(peer().config)
    if message == "use_flow_sigmas":  # noise predicted on the flow path
        assert type(adopt(peer())) is VDMFlowScheduler and adopt(peer()).config.prediction_type == "epsilon"
    else:
        with pytest.raises(ValueError, match=message):
            adopt(peer())


def test_a_class_that_only_visited_leaves_the_table_alone():
    ours = VDMScheduler(beta_schedule="scaled_linear", stochasticity=0.0)
    visitor = EDMEulerScheduler.from_config(ours.config)
    assert torch.equal(VDMScheduler.from_config(visitor.config).betas, ours.betas)
    refused = VDMScheduler.from_config(EDMEulerScheduler(num_train_timesteps=1000).config)  # Diffusers expects silence
    for use in (lambda s: s.log_snr(3), lambda s: s.set_timesteps(3), lambda s: s.add_noise(*torch.ones(2, 1, 1), 3)):
        with pytest.raises(ValueError, match="sigma space"):
            use(refused)
    with pytest.raises(ValueError, match="sigma space"):
        refused.step(torch.ones(1, 1), 3, torch.ones(1, 1))


def test_a_saved_stock_scheduler(tmp_path):
    for peer in (LCMScheduler(), DDIMScheduler(), diffusers.CogVideoXDDIMScheduler(snr_shift_scale=2.0)):
        peer.save_pretrained(tmp_path)
        check_table(VDMScheduler.from_pretrained(tmp_path), peer, guard=False)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Use VDMFlowScheduler"):
        VDMScheduler.from_pretrained(tmp_path)


def test_classes_that_nobody_knows():
    table = {"num_train_timesteps": 10, "beta_start": 0.01, "beta_end": 0.2, "beta_schedule": "linear"}
    known = VDMScheduler.from_config({"_class_name": "SomebodysScheduler", **table})
    assert torch.equal(known.betas, VDMScheduler(**table).betas)
    with pytest.raises(ValueError, match="SomebodysScheduler describes no table of betas"):
        VDMScheduler.from_config({"_class_name": "SomebodysScheduler", "num_train_timesteps": 10})
    assert VDMScheduler.from_config({"num_train_timesteps": 10}).config.num_train_timesteps == 10
    assert VDMScheduler.from_config({}).config.num_train_timesteps == 1000


def test_arguments_by_position_are_kept_where_another_class_takes_the_config():
    config = VDMScheduler(500, 0.0002).config
    other = DDIMScheduler.from_config(config)
    assert (other.config.num_train_timesteps, other.config.beta_start) == (500, 0.0002)
    assert (
        DDIMScheduler.from_config(DDPMScheduler(500).config).config.num_train_timesteps == 1000
    )  # the peer's are lost
    assert LCMScheduler.from_config(VDMScheduler().config).config.beta_schedule == "scaled_linear"  # none was set


# --- what is assigned to a scheduler ---------------------------------------------------------------------------------


def zero_terminal(betas):
    """The recipe of Lin et al. 2024 as scripts have it."""
    root = (1 - betas).cumprod(0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    alpha_bar = ((root - last) * first / (first - last)) ** 2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def test_a_recipe_that_assigns_the_tables_is_followed_as_by_the_peer(tmp_path):
    outputs = []
    for scheduler in (DDPMScheduler(prediction_type="v_prediction"), VDMScheduler(prediction_type="v_prediction")):
        scheduler.betas = zero_terminal(scheduler.betas)
        scheduler.alphas = 1 - scheduler.betas
        scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, dim=0)
        scheduler.set_timesteps(10)
        z = torch.randn(2, 1, 4, 4, generator=torch.manual_seed(0))
        for t in scheduler.timesteps:
            z = scheduler.step(0.1 * z, t, z, generator=torch.manual_seed(1)).prev_sample
        noisy = scheduler.add_noise(z, torch.ones_like(z), torch.tensor([999, 30]))
        outputs.append(torch.stack([z, noisy]))
    assert float((outputs[0] - outputs[1]).abs().max()) < 1e-4
    assert float(scheduler.log_snr(999)) == -math.inf
    scheduler.save_pretrained(tmp_path)  # Diffusers' own forgets it
    assert torch.equal(VDMScheduler.from_pretrained(tmp_path).betas, scheduler.betas)


@pytest.mark.parametrize("name", ["betas", "alphas", "alphas_cumprod"])
@pytest.mark.parametrize("in_place", [False, True])
def test_one_table_that_is_assigned_or_written_into(name, in_place):
    scheduler, source = VDMScheduler(), VDMScheduler(beta_schedule="scaled_linear", beta_start=0.001)
    if in_place:
        getattr(scheduler, name).copy_(getattr(source, name))
    else:
        setattr(scheduler, name, getattr(source, name))
    scheduler.set_timesteps(20)
    t = torch.arange(1000)
    torch.testing.assert_close(scheduler.log_snr(t), source.log_snr(t), rtol=0, atol=3e-3)
    torch.testing.assert_close(scheduler.alphas_cumprod, source.alphas_cumprod, rtol=1e-5, atol=0)


def test_an_assignment_in_the_middle_of_a_run_and_one_that_says_nothing_new():
    scheduler = VDMScheduler()
    scheduler.set_timesteps(10)
    exact = scheduler.log_snr(torch.arange(1000))
    for table in (
        scheduler.alphas_cumprod.double(),
        scheduler.alphas_cumprod.clone(),
        (1 - scheduler.betas).cumprod(0),
    ):
        scheduler.alphas_cumprod = table
        assert torch.equal(scheduler.log_snr(torch.arange(1000)), exact) and scheduler.config.trained_betas is None
    own = scheduler.timesteps
    scheduler.betas = 2 * scheduler.betas
    assert scheduler.timesteps is own
    x, z = torch.randn(2, 1, 2, 2, generator=torch.manual_seed(0)).unbind()
    expected = VDMScheduler(trained_betas=scheduler.betas)
    expected.set_timesteps(10)
    a, b = (s.step(x, own[3], z, generator=torch.manual_seed(0)).prev_sample for s in (scheduler, expected))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_schedule_in_log_snr_follows_no_betas():
    scheduler = VDMScheduler(beta_schedule="log_snr_linear")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()  # moved, not changed
    with pytest.raises(ValueError, match="cannot be assigned. Make a VDMScheduler"):
        scheduler.betas = scheduler.betas / 2


def test_warnings_are_none_for_ordinary_configurations():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for peer in (DDPMScheduler(), LCMScheduler(), DPMSolverMultistepScheduler(use_karras_sigmas=True)):
            scheduler = VDMScheduler.from_config(peer.config)
            scheduler.set_timesteps(4)
            assert len(scheduler.timesteps) == 4


COMPATIBLE = [
    cls for cls in VDMScheduler().compatibles if not isinstance(cls, DummyObject)
]  # those that are installed


@pytest.mark.parametrize("cls", sorted(COMPATIBLE, key=lambda c: c.__name__), ids=lambda c: c.__name__)
def test_a_config_comes_back_from_every_compatible_class_as_it_went(cls):
    config = {
        "num_train_timesteps": 1000,
        "beta_schedule": "linear",
        "variance_type": "fixed_small",
        "clip_sample": True,
    }
    ours = VDMScheduler(beta_start=1e-4, beta_end=0.02, **config)
    back = VDMScheduler.from_config(cls.from_config(ours.config).config)
    unset = "_use_default_values"
    known = {key: value for key, value in back.config.items() if key in ours.config and key != unset}
    assert known == {key: value for key, value in ours.config.items() if key != unset}
    assert set(back.config[unset]) == set(ours.config[unset])


@pytest.mark.parametrize("make", [VDMScheduler, VDMFlowScheduler, VDMSigmaScheduler])
def test_what_was_saved_says_everything(make, tmp_path):
    """Diffusers: a scheduler that was saved and loaded has no values by default, all stand in its file."""
    ours = make()
    ours.save_pretrained(tmp_path)
    config = {key: value for key, value in ours.config.items() if key != "_use_default_values"}
    assert dict(make.from_pretrained(tmp_path).config) == config
