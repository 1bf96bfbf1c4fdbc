"""The arguments of train.py: names, recipes, coercion, refusals."""

import dataclasses
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import arguments
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from arguments.meaning import RULES
from data import ImageSet
from diffusion import make_scheduler
from latent_models import make_latent_model
from networks import make_network

from vdm_diffusers import decoders, objectives, prediction
from vdm_diffusers.models import autoencoder_variational

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
    return {field.name for group in arguments.GROUPS for field in dataclasses.fields(group)}


def refusal(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        arguments.parse_arguments(list(argv))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def help_text(capsys, *topic: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        arguments.parse_arguments(["--help", *topic])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_names_are_those_of_train_unconditional():
    ours = field_names()
    assert set(TRAIN_UNCONDITIONAL.split()) - ours == set(arguments.REPLACED_ARGUMENTS)
    assert not ours & set(arguments.REPLACED_ARGUMENTS)


@pytest.mark.parametrize("name", sorted(arguments.REPLACED_ARGUMENTS))
def test_what_is_replaced_says_by_what(name, capsys):
    assert arguments.REPLACED_ARGUMENTS[name] in refusal(capsys, f"--{name}", "3")


def test_help_explains_every_argument(capsys):
    for group in arguments.GROUPS:
        for field in dataclasses.fields(group):
            assert len(field.metadata["help"]) > 10, field.name
    everything = help_text(capsys, "all")
    assert all(f"--{name}" in everything for name in field_names())


def test_plain_help_is_a_dozen_arguments_and_the_way_to_the_others(capsys):
    first = help_text(capsys)
    shown = {name for name in field_names() if re.search(rf"^  --{name} ", first, re.MULTILINE)}
    assert {"dataset_name", "train_data_dir", "output_dir", "max_train_steps", "resume_from_checkpoint"} <= shown
    assert 10 <= len(shown) <= 14
    assert "--help all" in first and "{data,model,diffusion,optimisation,run}" in first
    group = help_text(capsys, "diffusion")
    assert "--log_snr_max" in group and "--learning_rate" not in group
    alone = help_text(capsys, "--log-snr-max")
    assert "--log_snr_max" in alone and "--log_snr_min NUMBER" not in alone


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_help_and_mistakes_are_answered_before_anything_heavy_is_imported(script):
    """Processor time, measured by the child itself; the imports of the run take ten seconds."""
    path = Path(arguments.__file__).parents[1] / script
    for argv, code in ((["--help", "all"], 0), (["--seed", "many"], 2)):
        run = subprocess.run([sys.executable, "-X", "importtime", path, *argv], capture_output=True, text=True)
        assert run.returncode == code, run.stderr
        imported = {
            line.rsplit("|", 1)[1].strip() for line in run.stderr.splitlines() if line.startswith("import time")
        }
        assert not imported & {"torch", "transformers", "diffusers", "accelerate", "vdm_diffusers", "datasets"}


def test_no_arguments_is_the_digits_recipe():
    recipe = yaml.safe_load(arguments.DIGITS_RECIPE.read_text(encoding="utf-8"))
    values = arguments.parse_arguments([]).flat()
    assert values["dataset_name"] is None
    assert values["train_data_dir"] is None
    for name, value in recipe.items():
        assert math.isclose(values[name], float(value)) if isinstance(values[name], float) else values[name] == value


def test_a_data_set_without_a_recipe_takes_the_general_defaults():
    values = arguments.parse_arguments(["--dataset_name", "someone/images"]).flat()
    assert values["log_snr_max"] == 13.3
    assert values["learning_rate"] == arguments.OptimizationArguments.learning_rate


def test_the_command_line_overrides_the_recipe_and_values_are_coerced(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    # YAML reads 2e-4 as a string, 1 as an integer, and knows nothing of aliases
    recipe.write_text(
        "learning_rate: 2e-4\nema_power: 1\nuse_ema: false\nfourier_exponents: [1, 2]\nbeta_schedule: log_snr_cosine\n"
        "log_snr_min: -5e-1\nmax_train_steps: null\nseed: 3\n"
    )
    values = arguments.parse_arguments(["--config", str(recipe), "--seed=4", "--fourier-exponents", "5"]).flat()
    assert values["learning_rate"] == 2e-4
    assert isinstance(values["ema_power"], float)
    assert values["use_ema"] is False
    assert values["fourier_exponents"] == [5.0]
    assert values["ddpm_beta_schedule"] == "log_snr_cosine"
    assert values["log_snr_min"] == -0.5
    assert values["max_train_steps"] is None
    assert values["seed"] == 4
    assert arguments.parse_arguments([f"--config={recipe}", "--log_snr_min", "-1e0"]).flat()["log_snr_min"] == -1


def test_none_takes_back_what_a_recipe_says(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "log_snr_table: [13.3, 2, -5]\nattention_head_dim: 8\neval_split: test\nimage_mode: L\ntrain_data_dir: x\n"
    )
    argv = ["--log_snr_table", "none", "--attention_head_dim", "none", "--eval_split", "None", "--image_mode", "none"]
    values = arguments.parse_arguments(["--config", str(recipe), *argv]).flat()
    assert [values[n] for n in ("log_snr_table", "attention_head_dim", "eval_split", "image_mode")] == [None] * 4


def test_values_of_a_recipe_are_the_text_that_they_are(tmp_path):
    """YAML itself reads `no` as false and 010 as 8."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("mixed_precision: no\nuse_ema: off\nseed: 010\nhub_license: 1.0\nlearn_schedule: yes\n")
    values = arguments.parse_arguments(["--config", str(recipe)]).flat()
    names = ("mixed_precision", "use_ema", "seed", "hub_license", "learn_schedule")
    assert [values[name] for name in names] == ["no", False, 10, "1.0", True]


def test_a_data_set_on_the_command_line_replaces_the_recipes(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dataset_name: some/set\nimage_column: img\neval_split: test\nresolution: 8\n")
    parsed = arguments.parse_arguments(["--config", str(recipe), "--train_data_dir", "mine"])
    values = parsed.flat()
    assert (values["dataset_name"], values["train_data_dir"]) == (None, "mine")
    assert (values["image_column"], values["eval_split"], values["resolution"]) == (None, None, 8)
    [note] = parsed.notes
    assert "--train_data_dir takes the place of the recipe's data" in note and "dataset_name some/set" in note
    both = ["--train_data_dir", "mine", "--dataset_name", "other"]
    assert "give one of them" in refusal(capsys, *both)


def test_what_means_nothing_is_refused_if_typed_and_left_out_with_a_word_if_a_recipe_has_it(capsys):
    """The digits' recipe has a table of log SNRs, which a table of betas has no use for and nobody typed."""
    parsed = arguments.parse_arguments(["--ddpm_beta_schedule", "linear"])
    assert parsed.diffusion.log_snr_table is None
    assert any("without the recipe's log_snr_max, log_snr_table" in note for note in parsed.notes)
    every = {name for rule in RULES for name in rule.names}
    assert every <= field_names()
    for argv in (
        ["--ddpm_beta_schedule", "linear", "--log_snr_max", "9"],
        ["--resolution", "16"],
        ["--use_ema", "false", "--ema_power", "1"],
        ["--latent_channels", "3"],
        ["--model", "vae", "--hidden_channels", "8"],
        ["--model", "hvae", "--class_conditional"],
        ["--hub_model_id", "me/model"],
        ["--train_data_dir", "x", "--center_crop"],
        ["--loss", "simple", "--min_snr_gamma", "3"],
        ["--max_train_steps", "5", "--num_epochs", "3"],
    ):
        message = refusal(capsys, *argv)
        name = argv[-1] if argv[-1].startswith("--") else argv[-2]
        assert f"{name} means nothing here: it needs" in message
    assert arguments.parse_arguments(["--no_use_ema"]).optimization.use_ema is False


def test_the_words_of_the_core_are_its_own():
    """They are written down again in `arguments.groups`, which must not import the core."""
    for name, module in (
        ("Likelihood", autoencoder_variational),
        ("Objective", objectives),
        ("PredictionType", prediction),
        ("PixelEncoding", decoders),
    ):
        assert getattr(arguments.groups, name) == getattr(module, name)


HOSTILE = {
    "UTF-16": ("seed: 1\n".encode("utf-16"), "UTF-8"),
    "not text": (bytes(range(128, 256)), "UTF-8"),
    "nested": (b"a: " + b"[" * 5000 + b"]" * 5000, "nested too deep"),
    "anchors": (
        b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 60)),
        "no anchors",
    ),
    "twice": (b"seed: 1\nseed: 2\n", "second time"),
    "large": (b"# " + b"x" * (1 << 20), "at most"),
    "list as key": (b"? [a]\n: 1\n", "is a word"),
    "tag": (b"seed: !!python/object/apply:os.system [exit]\n", "invalid int value"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_files_that_are_no_recipes_are_refused_at_once(kind, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(HOSTILE[kind][0])
    began = time.perf_counter()
    message = refusal(capsys, "--config", str(recipe))
    assert time.perf_counter() - began < 2
    assert HOSTILE[kind][1] in message and str(recipe) in message
    assert len(message.strip().splitlines()) == 1


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
        (["--train_batch_size", "0"], "--train_batch_size must be at least 1, got 0"),
        (["--adam_beta2", "1"], "--adam_beta2 must lie in [0, 1)"),
        (["--eval_fraction", "1.5"], "--eval_fraction must lie in (0, 1)"),
        (["--log_snr_max", "-13.3", "--log_snr_min", "5"], "Did you pass gamma?"),
        (["--class_dropout", "0.1"], "needs --class_conditional"),
        (["--beta_schedule", "linear", "--train_time", "discrete"], "--train_time continuous"),
        (["--beta_schedule", "linear", "--eval_num_samples", "2"], "4 for a table of betas"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["stray"], "'stray' belongs to no argument"),
    ],
)
def test_bad_arguments_stop_with_what_to_do(argv, complaint, capsys):
    assert complaint in refusal(capsys, *argv)


def test_the_token_is_never_written_down():
    parsed = arguments.parse_arguments(["--hub_token", "secret"])
    assert parsed.run.hub_token == "secret"
    assert "secret" not in str(parsed.flat())


@pytest.mark.parametrize("recipe", arguments.recipes(), ids=lambda path: Path(path).stem)
def test_every_recipe_parses_and_describes_a_network_that_can_be_built(recipe):
    parsed = arguments.parse_arguments(["--config", recipe])
    assert Path(recipe).stem in parsed.run.output_dir
    size = parsed.data.resolution or 8
    if parsed.model.model_config_name_or_path:
        size = json.loads(Path(parsed.model.model_config_name_or_path).read_text(encoding="utf-8"))["sample_size"]
    channels = 1 if parsed.data.image_mode == "L" or parsed.data.dataset_name is None else 3
    levels = 17 if parsed.data.dataset_name is None and parsed.data.train_data_dir is None else 256
    pictures = torch.zeros(2, channels, size, size, dtype=torch.uint8)
    labels = torch.tensor([0, 1]) if parsed.model.class_conditional else None
    images = ImageSet(pictures, labels, levels, 10 if labels is not None else None, "none", "none")
    with torch.device("cpu" if parsed.model.analytic_start else "meta"):  # its tables are measured
        if parsed.model.model == "vdm":
            make_network(parsed, images)
        else:
            make_latent_model(parsed, images, levels)
    make_scheduler(parsed.diffusion)


def test_the_recipes_are_those_that_the_docs_name():
    names = {Path(recipe).name for recipe in arguments.recipes()}
    page = (Path(arguments.__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    assert names == set(re.findall(r"`([\w-]+\.yaml)`", page.split("## Recipes")[1].split("## ")[0]))


CONFIGS = sorted((Path(arguments.__file__).parents[1] / "accelerate_configs").glob("*.yaml"))


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
