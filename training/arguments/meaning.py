"""Arguments that mean nothing beside others: one that was typed is refused, one of a recipe is left out and named."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from .checks import LOG_SNR_SCHEDULES
from .fields import default_of
from .groups import Arguments

DIFFUSION = (
    *(
        "ddpm_beta_schedule",
        "log_snr_max",
        "log_snr_min",
        "log_snr_table",
        "ddpm_num_steps",
        "ddpm_num_inference_steps",
    ),
    *("stochasticity", "prediction_type", "loss", "min_snr_gamma", "sigmoid_bias", "train_time", "time_sampling"),
    *(
        "learn_schedule",
        "learn_end_points",
        "schedule_learning_rate",
        "variance_type",
        "vlb_weight",
        "path",
        "flow_shift",
    ),
)
OF_VP_SCHEDULES = ("ddpm_beta_schedule", "log_snr_max", "log_snr_min", "log_snr_table", "learn_schedule")
SIZES_OF_THE_U_NET = ("hidden_channels", "layers_per_block", "add_attention", "attention_head_dim")
SIZES_OF_THE_VAE = ("latent_channels", "block_out_channels", "likelihood")
OF_IMAGE_FILES = (
    *("dataset_config_name", "image_column", "label_column", "image_mode", "resolution", "center_crop"),
    *("preserve_input_precision", "array_channels", "skip_damaged"),
)


@dataclass(frozen=True)
class Rule:
    """Arguments `names` mean something only where `applies` holds; `needs` says so in words."""

    names: tuple[str, ...]
    needs: str
    applies: Callable[[Arguments], bool]


RULES = (
    Rule(
        OF_IMAGE_FILES,
        "images of your own (--dataset_name or --train_data_dir)",
        lambda a: a.data.dataset_name is not None or a.data.train_data_dir is not None,
    ),
    Rule(("dataset_config_name",), "--dataset_name", lambda a: a.data.train_data_dir is None),
    Rule(("center_crop",), "--resolution", lambda a: a.data.resolution is not None),
    Rule(("eval_fraction",), "no --eval_split", lambda a: a.data.eval_split is None),
    Rule(("shuffle_buffer_size",), "--streaming", lambda a: a.data.streaming),
    Rule(("decoded_images", "memory_share"), "no --streaming", lambda a: not a.data.streaming),
    Rule(("memory_share",), "--decoded_images auto", lambda a: a.data.decoded_images == "auto"),
    Rule(DIFFUSION, "--model vdm or latent_vdm", lambda a: a.model.model in ("vdm", "latent_vdm")),
    Rule(SIZES_OF_THE_U_NET, "--model vdm or latent_vdm", lambda a: a.model.model in ("vdm", "latent_vdm")),
    Rule(
        (
            *("fourier_exponents", "class_conditional", "class_dropout"),
            *("model_config_name_or_path", "pretrained_model_name_or_path", "analytic_start"),
        ),
        "--model vdm",
        lambda a: a.model.model == "vdm",
    ),
    Rule(
        (*SIZES_OF_THE_U_NET, "fourier_exponents", "norm_num_groups", "dropout"),
        "neither --model_config_name_or_path nor --pretrained_model_name_or_path, which say it",
        lambda a: a.model.model_config_name_or_path is None and a.model.pretrained_model_name_or_path is None,
    ),
    Rule(
        ("model_config_name_or_path", "analytic_start"),
        "no --pretrained_model_name_or_path, which says it",
        lambda a: a.model.pretrained_model_name_or_path is None,
    ),
    Rule(("attention_head_dim",), "--add_attention", lambda a: a.model.add_attention),
    Rule(("vae",), "--model vae or latent_vdm", lambda a: a.model.model in ("vae", "latent_vdm")),
    Rule(SIZES_OF_THE_VAE, "--model vae, hvae or latent_vdm", lambda a: a.model.model != "vdm"),
    Rule(SIZES_OF_THE_VAE, "no --vae, which says it", lambda a: a.model.vae is None),
    Rule(("num_layers",), "--model hvae", lambda a: a.model.model == "hvae"),
    Rule(("latent_stages",), "--model latent_vdm", lambda a: a.model.model == "latent_vdm"),
    Rule(
        ("log_snr_max", "log_snr_min", "log_snr_table"),
        "a --ddpm_beta_schedule in log SNR",
        lambda a: a.diffusion.ddpm_beta_schedule in LOG_SNR_SCHEDULES,
    ),
    Rule(OF_VP_SCHEDULES, "--path vp (a flow's schedule is --flow_shift)", lambda a: a.diffusion.path == "vp"),
    Rule(("flow_shift",), "--path flow", lambda a: a.diffusion.path == "flow"),
    Rule(("min_snr_gamma",), "--loss min_snr", lambda a: a.diffusion.loss == "min_snr"),
    Rule(("sigmoid_bias",), "--loss sigmoid", lambda a: a.diffusion.loss == "sigmoid"),
    Rule(("schedule_learning_rate",), "--learn_schedule", lambda a: a.diffusion.learn_schedule),
    Rule(("vlb_weight",), "a learned --variance_type", lambda a: a.diffusion.variance_type != "fixed_small"),
    Rule(("num_epochs",), "no --max_train_steps", lambda a: a.optimization.max_train_steps is None),
    Rule(("ema_inv_gamma", "ema_power", "ema_max_decay"), "--use_ema", lambda a: a.optimization.use_ema),
    Rule(
        ("lr_warmup_steps",),
        "another --lr_scheduler than constant",
        lambda a: a.optimization.lr_scheduler != "constant",
    ),
    Rule(("eval_change_samples", "early_stopping"), "--model vdm", lambda a: a.model.model == "vdm"),
    Rule(("logging_dir",), "a --logger", lambda a: a.run.logger != "none"),
    Rule(
        ("push_checkpoints", "hub_model_id", "hub_private_repo"),
        "--push_to_hub",
        lambda a: a.run.push_to_hub,
    ),
)


def leave_out_what_means_nothing(arguments: Arguments, typed: Collection[str], recipe: Collection[str]) -> None:
    """Give arguments that mean nothing their defaults, and note those of the recipe that had other values.

    Arguments:
        typed, recipe: the names of the arguments that stand on the command line, and in the recipe.
    Raises:
        ValueError: one of the command line means nothing.
    """
    for rule in RULES:
        if rule.applies(arguments):
            continue
        left_out = []
        for group in arguments.groups:
            for name in [name for name in rule.names if name in group.__dataclass_fields__]:
                default, value = default_of(group.__dataclass_fields__[name]), getattr(group, name)
                if name in typed and value:  # none, false and 0 ask for nothing
                    raise ValueError(f"--{name} means nothing here: it needs {rule.needs}.")
                if name in recipe and value != default:
                    left_out.append(name)
                setattr(group, name, default)
        if left_out:
            arguments.notes.append(f"without the recipe's {', '.join(left_out)}: needs {rule.needs}")
