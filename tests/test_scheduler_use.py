"""VDMScheduler as people use it: config changed on the way, threads, default devices, odd dtypes, one sample for a
batch, bad values.
"""

import json
import math
import threading
import time

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from vdm_diffusers import VDMScheduler, noise_schedules, prediction
from vdm_diffusers.schedulers import configuration

SHAPE = (2, 3, 4, 5)
LOG_SNR = {"beta_schedule": "log_snr_linear"}


def noise(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(scheduler, timesteps, seed=0):
    z = noise(seed)
    for t in timesteps:
        z = scheduler.step(0.5 * z, t, z, generator=torch.manual_seed(int(t))).prev_sample
    return z


# --- the config is read live -----------------------------------------------------------------------------------------

LATER = [
    {"clip_sample": False},
    {"clip_sample_range": 0.3},
    {"thresholding": True, "sample_max_value": 1.2},
    {"prediction_type": "v_prediction"},
    {"variance_type": "fixed_large"},
    {"prediction_type": "sample", "clip_sample": False},
]


@pytest.mark.parametrize("change", LATER, ids=str)
@pytest.mark.parametrize("way", ["attribute", "register_to_config"])
def test_the_config_may_change_after_set_timesteps_as_with_the_peer(change, way):
    results = []
    for scheduler in (DDPMScheduler(), VDMScheduler()):
        scheduler.set_timesteps(10)
        timesteps = list(scheduler.timesteps)
        first = run(scheduler, timesteps[:3])
        if way == "attribute":  # what Stable Cascade's pipelines do
            for key, value in change.items():
                setattr(scheduler.config, key, value)
        else:
            scheduler.register_to_config(**change)
        results.append(torch.stack([first, run(scheduler, timesteps[3:])]))
    assert float((results[0] - results[1]).abs().max()) < 1e-4 * float(results[0].abs().max())
    assert scheduler.step_index == 10


def test_own_keys_may_change_in_the_middle_of_a_run_too():
    scheduler = VDMScheduler(**LOG_SNR, stochasticity=0.0)
    scheduler.set_timesteps(10)
    t = list(scheduler.timesteps)
    run(scheduler, t[:4])
    scheduler.config.multistep_order = 2
    expected = VDMScheduler(**LOG_SNR, stochasticity=0.0, multistep_order=2)
    expected.set_timesteps(10)
    assert torch.equal(run(scheduler, t[4:]), run(expected, t[4:]))
    scheduler.register_to_config(prediction_type="noise")
    with pytest.raises(ValueError, match="`prediction_type` must be one of"):
        run(scheduler, t[:1])


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {**LOG_SNR, "stochasticity": 0.0, "multistep_order": 2}], ids=str)
def test_threads_that_share_a_scheduler_do_not_see_each_others_runs(config):
    def sample(scheduler, num_steps, pause):
        scheduler.set_timesteps(num_steps)
        z = noise(num_steps)
        for t in scheduler.timesteps:
            pause()
            z = scheduler.step(0.5 * z, t, z, generator=torch.Generator().manual_seed(int(t))).prev_sample
        return z

    counts = (5, 9, 14)
    alone = {n: sample(VDMScheduler(**config), n, lambda: None) for n in counts}
    shared, together = VDMScheduler(**config), {}
    threads = [
        threading.Thread(target=lambda n=n: together.update({n: sample(shared, n, lambda: time.sleep(1e-3))}))
        for n in counts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[n], alone[n]) for n in counts)


def test_a_thread_without_a_grid_of_its_own_takes_the_last():
    scheduler, found = VDMScheduler(), []
    scheduler.set_timesteps(7)
    thread = threading.Thread(target=lambda: found.append(scheduler.timesteps.tolist()))
    thread.start(), thread.join()
    assert found == [scheduler.timesteps.tolist()]


# --- devices and dtypes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, LOG_SNR, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}])
def test_a_default_device_moves_nothing(config):
    with torch.device("meta"):
        scheduler = VDMScheduler(**config)
        scheduler.set_timesteps(5)
        scheduler.set_timesteps(timesteps=[700, 20])
        scheduler.set_timesteps(5, device="cpu")
        DDPMScheduler()
    plain = VDMScheduler(**config)
    plain.set_timesteps(5)
    assert torch.equal(run(scheduler, scheduler.timesteps), run(plain, plain.timesteps))
    scheduler.set_timesteps(5, device="meta")
    assert scheduler.timesteps.device.type == "meta" and scheduler.betas.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_timesteps_of_every_integer_dtype(dtype):
    scheduler = VDMScheduler(num_train_timesteps=5)
    t = torch.tensor([0, 4, 1, 1, 0, 2], dtype=dtype)  # as many as the table of marginals has columns
    x, eps = noise(0, (6, 3)), noise(1, (6, 3))
    expected = scheduler.add_noise(x, eps, t.long())
    assert torch.equal(scheduler.add_noise(x, eps, t), expected)
    peer = DDPMScheduler(num_train_timesteps=5).add_noise(x, eps, t.long())
    torch.testing.assert_close(expected, peer, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scheduler.get_velocity(x, eps, t), scheduler.get_velocity(x, eps, t.long()))


@pytest.mark.parametrize(
    ("x", "eps", "count"), [(1, 1, 10), (10, 1, 10), (1, 10, 10), (2, 1, 1), (1, 2, 1), (2, 1, 2)]
)
def test_one_sample_or_one_noise_stands_for_a_batch_as_with_the_peers(x, eps, count):
    x, eps = noise(0, (x, 3, 4)), noise(1, (eps, 3, 4))
    t = torch.arange(100, 100 + count)
    for scheduler in (VDMScheduler(), VDMScheduler(**LOG_SNR)):
        noisy = scheduler.add_noise(x, eps, t)
        assert scheduler.get_velocity(x, eps, t).shape == noisy.shape
        for i in range(len(noisy)):
            one = scheduler.add_noise(x[i % len(x)][None], eps[i % len(eps)][None], t[i % count][None])
            assert torch.equal(noisy[i], one[0])
    peer = DDIMScheduler().add_noise(x, eps, t)
    torch.testing.assert_close(VDMScheduler().add_noise(x, eps, t), peer, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError):
        VDMScheduler().add_noise(noise(0, (3, 2)), noise(1, (2, 2)), torch.tensor([3]))


# --- what a config may hold ------------------------------------------------------------------------------------------


def test_values_of_numpy_and_torch_are_saved_and_loaded(tmp_path):
    table = {"log_snr": torch.tensor([-5.0, 13.3]), "mse": np.array([0.5, 1e-3])}
    scheduler = VDMScheduler(
        num_train_timesteps=np.int64(50),
        beta_start=np.float32(0.001),
        beta_end=torch.tensor(0.02),
        clip_sample=np.bool_(False),
        optimal_variance=table,
    )
    scheduler.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert (config["num_train_timesteps"], config["clip_sample"]) == (50, False)
    assert config["optimal_variance"]["mse"] == [0.5, 1e-3]
    assert torch.equal(VDMScheduler.from_pretrained(tmp_path).betas, scheduler.betas)
    tables = VDMScheduler(**LOG_SNR, log_snr_table=np.array([9.0, 0.0, -3.0]))
    assert tables.config.log_snr_table == [9.0, 0.0, -3.0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_train_timesteps": 2e8}, r"`num_train_timesteps` must be an integer in 1\.\.1000000, got 200000000\.0"),
        ({"num_train_timesteps": 1000.0}, "must be an integer"),
        ({"num_train_timesteps": True}, "must be an integer"),
        ({"num_train_timesteps": "1000"}, "must be an integer"),
        ({"num_train_timesteps": 10**6 + 1}, "must be an integer in"),
        ({**LOG_SNR, "log_snr_table": []}, "`log_snr_table` must be a list of at least two"),
        ({**LOG_SNR, "log_snr_table": [3.0]}, "`log_snr_table` must be a list of at least two"),
        ({"trained_betas": []}, "`trained_betas` must be a list"),
        (
            {"beta_schedule": "log_snr"},
            "`beta_schedule` must be one of linear, .*, log_snr_linear, log_snr_cosine, got 'log_snr'",
        ),
        ({"stochasticity": math.nan}, "stochasticity"),
        ({"clip_sample_range": object()}, "`clip_sample_range` must be a number"),
        ({"optimal_variance": {"log_snr": {3.0}, "mse": [1.0]}}, "`optimal_variance` must be"),
    ],
    ids=str,
)
def test_refused_at_construction(config, message):
    with pytest.raises(ValueError, match=message):
        VDMScheduler(**config)


@pytest.mark.parametrize("config", [LOG_SNR, {}], ids=str)
def test_the_longest_chain_is_made_in_a_moment(config):
    start = time.perf_counter()
    scheduler = VDMScheduler(num_train_timesteps=10**6, beta_start=1e-7, beta_end=2e-5, **config)
    scheduler.set_timesteps(10)
    assert time.perf_counter() - start < 10  # 40 s once, and 1 s on an idle machine
    assert len(scheduler.timesteps) == 10


def test_betas_of_zero_are_named():
    with pytest.warns(UserWarning, match=r"betas must lie in \(0, 1\]"):
        scheduler = VDMScheduler(trained_betas=[0.1, 0.0, 0.2], num_train_timesteps=3)
    with pytest.raises(ValueError, match="`betas` must be positive, got 0 .* at entry 1"):
        assert scheduler.noise_schedule


def test_a_new_noise_schedule_is_one_entry(monkeypatch):
    """As CONTRIBUTING.md says: a class and its name in one file, and the scheduler and everything behind it take
    it.
    """

    class Halved(noise_schedules.LinearLogSNRSchedule):
        pass

    monkeypatch.setitem(noise_schedules.LOG_SNR_SCHEDULES, "log_snr_halved", Halved)
    scheduler = VDMScheduler(beta_schedule="log_snr_halved", log_snr_max=9.0)
    assert type(scheduler.noise_schedule) is Halved and scheduler.is_log_snr_schedule
    scheduler.set_timesteps(7)
    assert len(scheduler.timesteps) == 7


# --- a name that somebody adds and forgets in a branch ---------------------------------------------------------------


def test_an_unknown_name_raises_in_every_branch(monkeypatch):
    with pytest.raises(ValueError, match="log_snr_new"):
        VDMScheduler(beta_schedule="log_snr_new")
    monkeypatch.setattr(configuration, "BETA_SCHEDULES", (*configuration.BETA_SCHEDULES, "new"))
    with pytest.raises(ValueError, match="new"):
        VDMScheduler(beta_schedule="new")
    with pytest.raises(ValueError, match="new"):
        noise_schedules.make_betas("new", 10)
    monkeypatch.setattr(prediction, "PREDICTION_TYPES", (*prediction.PREDICTION_TYPES, "new"))
    for call in (
        lambda: VDMScheduler(prediction_type="new"),
        lambda: prediction.target_coefficients(0.0, "new"),
        lambda: prediction.conversion_coefficients(0.0, source="new", target="sample"),
        lambda: prediction.conversion_coefficients(0.0, source="sample", target="new"),
    ):
        with pytest.raises(ValueError, match="new"):
            call()
