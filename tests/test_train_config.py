"""The arguments of train.py: names, recipes, coercion, refusals."""

import dataclasses
import math
import re
from pathlib import Path

import config
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from data import ImageSet
from diffusion import make_scheduler
from latent_models import make_latent_model
from networks import make_network

# The arguments of Diffusers' examples/unconditional_image_generation/train_unconditional.py.
TRAIN_UNCONDITIONAL = """
dataset_name dataset_config_name model_config_name_or_path train_data_dir output_dir overwrite_output_dir cache_dir resolution
center_crop random_flip train_batch_size eval_batch_size dataloader_num_workers num_epochs save_images_epochs save_model_epochs
gradient_accumulation_steps learning_rate lr_scheduler lr_warmup_steps adam_beta1 adam_beta2 adam_weight_decay adam_epsilon
use_ema ema_inv_gamma ema_power ema_max_decay push_to_hub hub_token hub_model_id hub_private_repo logger logging_dir local_rank
mixed_precision prediction_type ddpm_num_steps ddpm_num_inference_steps ddpm_beta_schedule checkpointing_steps
checkpoints_total_limit resume_from_checkpoint enable_xformers_memory_efficient_attention preserve_input_precision
"""


def field_names() -> set[str]:
    return {field.name for group in config.GROUPS for field in dataclasses.fields(group)}


def refusal(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        config.parse_arguments(list(argv))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_names_are_those_of_train_unconditional():
    ours = field_names()
    assert set(TRAIN_UNCONDITIONAL.split()) - ours == set(config.REPLACED_ARGUMENTS)
    assert not ours & set(config.REPLACED_ARGUMENTS)


@pytest.mark.parametrize("name", sorted(config.REPLACED_ARGUMENTS))
def test_what_is_replaced_says_by_what(name, capsys):
    assert config.REPLACED_ARGUMENTS[name] in refusal(capsys, f"--{name}", "3")


def test_help_explains_every_argument(capsys):
    for group in config.GROUPS:
        for field in dataclasses.fields(group):
            assert len(field.metadata["help"]) > 10, field.name
    with pytest.raises(SystemExit) as stopped:
        config.parse_arguments(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in field_names())


def test_no_arguments_is_the_digits_recipe():
    recipe = yaml.safe_load(config.DIGITS_RECIPE.read_text(encoding="utf-8"))
    values = config.parse_arguments([]).flat()
    assert values["dataset_name"] is None
    assert values["train_data_dir"] is None
    for name, value in recipe.items():
        assert math.isclose(values[name], float(value)) if isinstance(values[name], float) else values[name] == value


def test_a_data_set_without_a_recipe_takes_the_general_defaults():
    values = config.parse_arguments(["--dataset_name", "someone/images"]).flat()
    assert values["log_snr_max"] == 13.3
    assert values["learning_rate"] == config.OptimizationArguments.learning_rate


def test_the_command_line_overrides_the_recipe_and_values_are_coerced(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    # YAML reads 2e-4 as a string, 1 as an integer, and knows nothing of aliases
    recipe.write_text(
        "learning_rate: 2e-4\nema_power: 1\nuse_ema: false\nfourier_exponents: [1, 2]\nbeta_schedule: linear\n"
        "log_snr_min: -5e-1\nmax_train_steps: null\nseed: 3\n"
    )
    values = config.parse_arguments(["--config", str(recipe), "--seed=4", "--fourier-exponents", "5"]).flat()
    assert values["learning_rate"] == 2e-4
    assert isinstance(values["ema_power"], float)
    assert values["use_ema"] is False
    assert values["fourier_exponents"] == [5.0]
    assert values["ddpm_beta_schedule"] == "linear"
    assert values["log_snr_min"] == -0.5
    assert values["max_train_steps"] is None
    assert values["seed"] == 4
    assert config.parse_arguments([f"--config={recipe}", "--log_snr_min", "-1e0"]).flat()["log_snr_min"] == -1


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("learning_rte: 1", "Did you mean --learning_rate?"),
        ("save_model_epochs: 1", "--checkpointing_steps"),
        ("train_batch_size: many", "invalid int value: 'many'"),
        ("loss: l3", "invalid choice: 'l3'"),
        ("loss: {a: b}", "must be a value"),
        ("- a", "`argument: value`"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_bad_recipe_is_refused_by_its_name(line, complaint, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(line + "\n")
    message = refusal(capsys, "--config", str(recipe))
    assert complaint in message
    assert str(recipe) in message


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--learning", "1"], "unknown argument --learning"),  # no abbreviations: they would change with new arguments
        (["--train_batch_size", "0"], "--train_batch_size must be positive, got 0"),
        (["--adam_beta2", "1"], "--adam_beta2 must lie in [0, 1)"),
        (["--eval_fraction", "1.5"], "--eval_fraction must lie in (0, 1)"),
        (["--log_snr_max", "-13.3", "--log_snr_min", "5"], "Did you pass gamma?"),
        (["--class_dropout", "0.1"], "needs --class_conditional"),
        (["--beta_schedule", "linear", "--train_time", "discrete"], "--train_time continuous"),
        (["--beta_schedule", "linear", "--eval_num_samples", "2"], "4 for a table of betas"),
        (["--config", "nowhere.yaml"], "there is no file nowhere.yaml"),
        (["stray"], "'stray' belongs to no argument"),
    ],
)
def test_bad_arguments_stop_with_what_to_do(argv, complaint, capsys):
    assert complaint in refusal(capsys, *argv)


def test_the_token_is_never_written_down():
    arguments = config.parse_arguments(["--hub_token", "secret"])
    assert arguments.run.hub_token == "secret"
    assert "secret" not in str(arguments.flat())


@pytest.mark.parametrize("recipe", config.recipes(), ids=lambda path: Path(path).stem)
def test_every_recipe_parses_and_describes_a_network_that_can_be_built(recipe):
    arguments = config.parse_arguments(["--config", recipe])
    assert Path(recipe).stem in arguments.run.output_dir
    size = arguments.data.resolution or 8
    channels = 1 if arguments.data.image_mode == "L" or arguments.data.dataset_name is None else 3
    levels = 17 if arguments.data.dataset_name is None and arguments.data.train_data_dir is None else 256
    pictures = torch.zeros(2, channels, size, size, dtype=torch.uint8)
    images = ImageSet(pictures, None, levels, None, "none", "none")
    with torch.device("meta"):
        if arguments.model.model == "vdm":
            make_network(arguments, images)
        else:
            make_latent_model(arguments, images, levels)
    make_scheduler(arguments.diffusion)


def test_the_recipes_are_those_that_the_docs_name():
    names = {Path(recipe).name for recipe in config.recipes()}
    page = (Path(config.__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    assert names == set(re.findall(r"`([\w-]+\.yaml)`", page.split("## Recipes")[1].split("## ")[0]))


CONFIGS = sorted((Path(config.__file__).parent / "accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path):
    loaded = load_config_from_file(str(path))  # refuses keys that it does not know
    launch = launch_command_parser().parse_args(["--config_file", str(path), "training/train.py", "--seed=1"])
    merged, *_ = _validate_launch_command(launch)
    for name in ("num_machines", "num_processes", "machine_rank", "mixed_precision"):
        assert getattr(merged, name) == getattr(loaded, name), name
    kind = path.stem.split("_")[0]
    assert bool(merged.use_fsdp) == (kind == "fsdp")
    assert bool(merged.use_deepspeed) == (kind == "deepspeed")
    assert bool(merged.multi_gpu) == (loaded.num_processes > 1 and kind not in ("fsdp", "deepspeed"))
    assert merged.training_script_args == ["--seed=1"]
    assert loaded.mixed_precision == "no"  # which leaves it to --mixed_precision


def test_accelerate_refuses_a_key_that_it_does_not_know(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(CONFIGS[0].read_text() + "num_processes_typo: 1\n")
    with pytest.raises(ValueError, match="num_processes_typo"):
        load_config_from_file(str(path))
