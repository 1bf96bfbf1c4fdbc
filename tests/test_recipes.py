"""The recipes: each is a run of its own network and loss that starts, saves, and goes on."""

import json
import math
from pathlib import Path

import PIL.Image
import pytest
import torch
import train
import yaml
from accelerate.state import AcceleratorState, GradientState
from latent_models import load_saved

from vdm_diffusers import VDMPipeline

RECIPES = sorted((Path(train.__file__).parent / "recipes").glob("*.yaml"))
# Their 64 and 128 residual blocks of 128 and 256 channels take minutes for a step on a CPU: they keep every width and
# every kind of layer, and are two layers deep.
DEEP = {"cifar10-ddpm", "cifar10-vdm-paper", "imagenet64"}
SHAPES = {"mnist": (28, "L"), "latent": (28, "L"), "imagenet64": (64, "RGB")}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_saves_and_goes_on(recipe, tmp_path):
    given = yaml.safe_load(recipe.read_text())
    side, mode = SHAPES.get(recipe.stem, (32, "RGB"))
    data = tmp_path / "data" / "train"
    data.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for index in range(20):
        pixels = torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8).numpy()
        PIL.Image.fromarray(pixels).convert(mode).save(data / f"{index}.png")
    output_dir = tmp_path / "run"
    options = {
        **{name: str(data.parent) for name in ("dataset_name", "train_data_dir") if name in given},
        **({"layers_per_block": 2} if recipe.stem in DEEP else {}),
        "output_dir": output_dir,
        "cache_dir": tmp_path / "cache",
        "logger": "none",
        "logging_steps": 1,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "compile": False,
        "eval_steps": 0,
        "sample_steps": 0,
    }

    def run(**more):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        arguments = {"config": recipe, **options, **more}
        return train.main([f"--{name}={value}" for name, value in arguments.items()])

    assert run() == 0
    if given.get("model", "vdm") == "vdm":
        pipeline = VDMPipeline.from_pretrained(output_dir)
        config = pipeline.unet.config
        for name in ("hidden_channels", "layers_per_block", "norm_num_groups", "fourier_exponents"):
            assert getattr(config, name) == options.get(name, given.get(name, getattr(config, name)))
        loaded = pipeline.unet
        assert pipeline(batch_size=1, num_inference_steps=2).images[0].size[0] in (8, side)
    else:
        loaded = load_saved(given["model"], output_dir)
    assert all(bool(value.isfinite().all()) for value in loaded.state_dict().values())
    assert run(resume_from_checkpoint="latest", max_train_steps=3) == 0
    losses = [json.loads(line).get("loss") for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)
