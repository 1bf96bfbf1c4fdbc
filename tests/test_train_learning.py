"""What train.py can learn besides the network: schedules, densities of times, variances; and stock networks with and
without classes.
"""

import json
import math

import pytest
import torch
import train
import yaml
from accelerate.state import AcceleratorState, GradientState
from arguments import DiffusionArguments
from checkpoints import discard
from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusion import DiffusionTask, Rows, make_scheduler
from safetensors.torch import load_file
from time_learning import TimeLearning

from vdm_diffusers import LearnedNoiseSchedule, VDMPipeline, evaluate_likelihood
from vdm_diffusers.learned_variance import decoder_bound, variance_bound
from vdm_diffusers.models.fourier import FourierFeaturesUNet

TINY = {
    "hidden_channels": 8,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "fourier_exponents": [2, 3],
    "log_snr_max": 9,
    "dropout": 0.1,
    "train_batch_size": 16,
    "learning_rate": "1e-3",
    "lr_warmup_steps": 2,
    "max_train_steps": 6,
    "checkpointing_steps": 3,
    "checkpoints_total_limit": 0,
    "logging_steps": 1,
    "eval_max_images": 8,
    "eval_num_samples": 4,
    "sample_steps": 0,
    "ddpm_num_inference_steps": 4,
    "num_sample_images": 4,
    "logger": "none",
}


@pytest.fixture
def run(tmp_path):
    """Train in this process: run(name, option=value, ...) -> the output folder."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(TINY))

    def in_process(name, **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        arguments = ["--config", str(recipe), "--output_dir", str(tmp_path / name)]
        for option, value in options.items():
            arguments += [f"--{option}", str(value)]
        assert train.main(arguments) == 0
        return tmp_path / name

    return in_process


def losses_of(folder):
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.parametrize(
    "options", [{"learn_schedule": True, "learn_end_points": True}, {"time_sampling": "adaptive", "loss": "sigmoid"}]
)
def test_what_is_learned_about_time_is_resumed_exactly(options, run):
    whole = run("whole", **options)
    halves = run("halves", **options, resume_from_checkpoint="latest")
    for left_over in ("checkpoint-6", "unet", "scheduler"):
        discard(halves / left_over)
    halves = run("halves", **options, resume_from_checkpoint="latest")
    assert losses_of(halves) == losses_of(whole) and len(losses_of(whole)) == 6
    for name in ("schedule.safetensors", "time_sampler.safetensors"):
        paths = [folder / "checkpoint-6" / "training_state" / name for folder in (whole, halves)]
        assert paths[0].exists() == paths[1].exists() == (("schedule" in name) == ("learn_schedule" in options))
        if paths[0].exists():
            first, second = map(load_file, paths)
            assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_learned_schedule_travels_in_the_schedulers_config(run):
    folder = run("learned", learn_schedule=True, learn_end_points=True, schedule_learning_rate=0.1)
    pipeline = VDMPipeline.from_pretrained(folder)
    schedule = LearnedNoiseSchedule(9.0, -5.0, learn_end_points=True)
    start = schedule.log_snr_max
    schedule.load_state_dict(load_file(folder / "checkpoint-6" / "training_state" / "schedule.safetensors"))
    table = pipeline.scheduler.config.log_snr_table
    assert table == schedule.table() and table[0] != start and table[0] < 9.0
    linear = torch.linspace(table[0], table[-1], len(table), dtype=torch.float64)
    assert float((torch.tensor(table).double() - linear).abs().max()) > 0.05  # it has moved
    assert pipeline.scheduler.config.log_snr_max == 9.0  # the envelope stays, and with it the network's input
    report = evaluate_likelihood(
        pipeline, torch.zeros(4, 1, 8, 8, dtype=torch.uint8), num_samples=4, progress_bar=False
    )
    assert report.settings["log_snr_max"] == table[0]
    assert len(pipeline(num_inference_steps=3, generator=torch.Generator().manual_seed(0)).images) == 1


@pytest.mark.parametrize("schedule", ["linear", "log_snr_linear"])
def test_a_learned_variance_is_trained_evaluated_and_sampled(schedule, run):
    folder = run(
        "variance",
        ddpm_beta_schedule=schedule,
        loss="simple",
        train_time="discrete",
        variance_type="learned_range",
        ddpm_num_steps=20,
        vlb_weight=0.1,
    )
    pipeline = VDMPipeline.from_pretrained(folder)
    assert pipeline.scheduler.config.variance_type == "learned_range" and pipeline.unet.config.out_channels == 2
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval/method"] == "discrete" and math.isfinite(last["eval/bits_per_dim"])
    assert len(pipeline(num_inference_steps=3, generator=torch.Generator().manual_seed(0)).images) == 1


def make_task(**values):
    args = DiffusionArguments(**values)
    scheduler = make_scheduler(args)
    learning = TimeLearning(args, scheduler, torch.device("cpu"))
    return DiffusionTask(
        args,
        scheduler,
        num_levels=17,
        seed=0,
        device=torch.device("cpu"),
        learned_schedule=learning.schedule,
        sampler=learning.sampler,
    )


def test_hybrid_losses_are_those_of_each_step():
    task = make_task(
        ddpm_beta_schedule="linear", ddpm_num_steps=6, loss="simple", variance_type="learned_range", vlb_weight=0.5
    )
    levels = torch.randint(0, 17, (24, 1, 3, 2), generator=torch.Generator().manual_seed(0))
    kept = {}

    def network(z_t, timestep, return_dict=False):
        kept["z_t"], kept["output"] = z_t, torch.cat([0.5 * z_t, (0.3 * z_t).tanh()], dim=1)
        return (kept["output"],)

    losses = task.losses(network, levels, None, Rows(3, 0, 24, 24))
    times, x = losses.times, 2 * (levels + 0.5) / 17 - 1
    alpha, sigma = torch.sigmoid(times.log_snr).sqrt(), torch.sigmoid(-times.log_snr).sqrt()
    noise = (kept["z_t"] - alpha.view(-1, 1, 1, 1) * x) / sigma.view(-1, 1, 1, 1)
    log_snr = task.scheduler.log_snr(torch.arange(6))
    assert set(times.step.tolist()) == {1, 2, 3, 4, 5, 6}
    for row in range(24):
        step, part = int(times.step[row]), slice(row, row + 1)
        inputs = kept["output"][part].double(), x[part].double(), noise[part].double()
        if step == 1:
            bound = decoder_bound(
                *inputs, levels[part], log_snr[0], log_snr[1],
                prediction_type="epsilon", num_levels=17, pixel_encoding="bin_center",
            )  # fmt: skip
        else:
            bound = variance_bound(*inputs, log_snr[step - 2], log_snr[step - 1], prediction_type="epsilon")
        simple = ((kept["output"][row, :1] - noise[row]) ** 2).mean()
        expected = float(simple) + 0.5 * 6 * float(bound[0]) / (6 * math.log(2))
        assert float(losses.values[row]) == pytest.approx(expected, rel=1e-4)


def test_adaptive_losses_are_weighted_back():
    # the network's error depends on t alone: whatever the density, the weighted mean is the mean over uniform times
    task = make_task(time_sampling="adaptive", loss="simple")
    levels = torch.zeros(512, 1, 1, 2, dtype=torch.uint8)

    def network(z_t, timestep, return_dict=False):
        return (z_t * 0 + (timestep / 500)[:, None, None, None] ** 2 + 5,)

    for step in range(40):
        losses = task.losses(network, levels, None, Rows(step, 0, 512, 512))
        task.sampler.update(task.sampler.sums(losses.times.t, losses.values))
    weights = losses.times.importance
    assert float(weights.max() / weights.min()) > 1.5
    averages = []
    for step in range(40, 60):
        losses = task.losses(network, levels, None, Rows(step, 0, 512, 512))
        averages.append(float(losses.weighted.mean()))
    t = (torch.arange(10_000) + 0.5) / 10_000
    expected = float(((((1000 * t - 1) / 500) ** 2 + 5) ** 2).mean()) + 1
    error = float(torch.tensor(averages).std()) / math.sqrt(20)
    assert abs(sum(averages) / 20 - expected) < 5 * error
    assert error < 0.01 * expected


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"learn_schedule": True, "loss": "simple"}, "--loss elbo or sigmoid or edm"),
        ({"learn_schedule": True, "ddpm_beta_schedule": "linear"}, "log_snr_linear"),
        ({"learn_schedule": True, "time_sampling": "adaptive"}, "not adaptive"),
        ({"learn_schedule": True, "train_time": "discrete"}, "continuous"),
        ({"learn_schedule": True, "log_snr_table": "9 1"}, "no --log_snr_table"),
        ({"learn_end_points": True}, "needs --learn_schedule"),
        ({"variance_type": "learned_range"}, "--train_time discrete"),
        ({"vlb_weight": 0}, "vlb_weight"),
    ],
)
def test_what_does_not_go_together_is_refused(options, complaint, tmp_path, capsys):
    recipe = tmp_path / "empty.yaml"
    recipe.write_text("")
    arguments = ["--config", str(recipe)] + [
        token for name, value in options.items() for token in (f"--{name}", *str(value).split())
    ]
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments)
    assert stopped.value.code == 2 and complaint in capsys.readouterr().err


# --- stock networks --------------------------------------------------------------------------------------------------


def write(folder, network):
    network.save_config(folder)
    return folder / "config.json"


def dit(num_classes):
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, num_layers=2, sample_size=8, num_embeds_ada_norm=num_classes
    )  # fmt: skip


@pytest.mark.parametrize("conditional", [True, False])
def test_a_dit_with_and_without_classes(conditional, run, tmp_path):
    config = write(tmp_path / "dit", dit(10 if conditional else 1))
    folder = run("dit-run", model_config_name_or_path=config, class_conditional=conditional, sample_steps=6)
    pipeline = VDMPipeline.from_pretrained(folder)
    assert type(pipeline.unet) is DiTTransformer2DModel
    labels = [3, 4] if conditional else None
    options = {"num_inference_steps": 3, "class_labels": labels, "batch_size": 2, "output_type": "pt"}
    images = pipeline(**options, generator=torch.Generator().manual_seed(1)).images
    assert images.shape == (2, 1, 8, 8)
    levels = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    report = evaluate_likelihood(pipeline, levels, class_labels=labels, num_samples=4, progress_bar=False)
    assert math.isfinite(report.bits_per_dim)


def test_a_stock_unet_that_wears_fourier_features(run, tmp_path):
    unet = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1}
    unet |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    network = FourierFeaturesUNet(unet, sample_size=8, in_channels=1, fourier_exponents=(2, 3))
    folder = run("fourier-run", model_config_name_or_path=write(tmp_path / "fourier", network))
    pipeline = VDMPipeline.from_pretrained(folder)
    assert type(pipeline.unet) is FourierFeaturesUNet
    images = pipeline(num_inference_steps=3, generator=torch.Generator().manual_seed(1), output_type="pt").images
    assert images.shape == (1, 1, 8, 8)


def test_a_stock_unet_with_room_for_no_class(run, tmp_path, capsys):
    def unet(num_classes):
        return UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), num_class_embeds=num_classes,
        )  # fmt: skip

    config = write(tmp_path / "unet", unet(11))
    folder = run("unet-run", model_config_name_or_path=config, class_conditional=True, class_dropout=0.5)
    pipeline = VDMPipeline.from_pretrained(folder)
    moved = pipeline.unet.class_embedding.weight
    assert moved.shape[0] == 11 and len(losses_of(folder)) == 6
    config = write(tmp_path / "full", unet(10))
    arguments = ["--model_config_name_or_path", str(config), "--class_conditional", "--class_dropout", "0.5"]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train.main([*arguments, "--output_dir", str(tmp_path / "refused"), "--logger", "none"]) == 2
    assert "give it 11 classes" in capsys.readouterr().err
