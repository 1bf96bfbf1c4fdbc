"""Every Python block of README.md and docs/*.md runs, in the order of its page, on small models.

A block that cannot (it needs the Hub, a GPU, a download) says so in a comment above it: <!-- not run: why -->. Names
that a page uses without making them (`pipe`, `images`, ...) are what `page_names` gives.
"""

import re
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from vdm_diffusers import LearnedNoiseSchedule, VDMPipeline, VDMScheduler, VDMUNet2DModel
from vdm_diffusers.decoders import encode_pixels
from vdm_diffusers.gaussian import diffuse
from vdm_diffusers.objectives import diffusion_loss
from vdm_diffusers.pipelines.conditioning import slerp
from vdm_diffusers.time_sampling import low_discrepancy

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- not run: (?P<why>[^>]+) -->\n+)?^```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str | None, str]]:
    """(line, reason not to run or None, code) of each block."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        found.append((text[: match.start("code")].count("\n") + 1, match["why"], match["code"]))
    return found


def small_unet(**options) -> VDMUNet2DModel:
    sizes = {
        "hidden_channels": 8,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "fourier_exponents": (2,),
        "dropout": 0.0,
    }
    return VDMUNet2DModel(sample_size=4, in_channels=1, **sizes, **options)


def page_names(page: Path, folder: Path) -> dict[str, object]:
    """What a reader of the page has at hand."""
    torch.manual_seed(0)
    unet = small_unet()
    scheduler = VDMScheduler(beta_schedule="log_snr_linear", log_snr_max=13.3, log_snr_min=-5.0)
    pipe = VDMPipeline(unet, scheduler, num_levels=17)
    if page.name == "scheduler.md" or page.name == "README.md":
        sizes = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        stock = UNet2DModel(sample_size=4, in_channels=1, out_channels=1, **sizes, **blocks)
        pipe = DDPMPipeline(stock, DDPMScheduler())
    other = VDMPipeline(small_unet(), scheduler, num_levels=17) if isinstance(pipe, VDMPipeline) else pipe
    pipe.set_progress_bar_config(disable=True)
    images = torch.randint(0, 17, (6, 1, 4, 4))
    x, z = encode_pixels(images, 17), torch.randn(6, 1, 4, 4)
    photo, mask = images[:1], torch.tensor([[0.0, 0, 1, 1]] * 4)
    names = {
        "pipe": pipe,
        "other_pipe": other,
        "class_pipe": VDMPipeline(small_unet(num_class_embeds=10), scheduler, num_levels=17),
        "labels": torch.arange(6),
        "unet": unet,
        "network": unet,
        "model": unet,
        "scheduler": scheduler,
        "folder": folder / "out",
        "images": images,
        "x": x,
        "noise": torch.randn_like(x),
        "z": z,
        "t": torch.linspace(0, 1, 6),
        "photo": photo,
        "first": photo,
        "second": images[1:2],
        "mask": mask,
        "latents_a": z[:1],
        "latents_b": z[1:2],
        # imported earlier on the page, or named there in words
        "slerp": slerp,
        "diffuse": diffuse,
        "diffusion_loss": diffusion_loss,
        "low_discrepancy": low_discrepancy,
        "VDMPipeline": VDMPipeline,
        "VDMScheduler": VDMScheduler,
        "DDPMPipeline": DDPMPipeline,
        "DDPMScheduler": DDPMScheduler,
        "LearnedNoiseSchedule": LearnedNoiseSchedule,
    }
    return names


def quick(pipe: VDMPipeline) -> VDMPipeline:
    """The pipeline with a default of four steps: what is shown is the call, not the picture."""

    class Quick(VDMPipeline):
        def __call__(self, *args, num_inference_steps=4, **options):
            return super().__call__(*args, num_inference_steps=num_inference_steps, **options)

        def interpolate(self, *args, num_inference_steps=4, **options):
            return super().interpolate(*args, num_inference_steps=num_inference_steps, **options)

    return Quick(**pipe.components, num_levels=pipe.config.num_levels)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, record_property):
    monkeypatch.chdir(tmp_path)  # what a block writes is not left in the repository
    published = VDMPipeline(small_unet(), VDMScheduler(beta_schedule="log_snr_linear"), num_levels=17)
    published.save_pretrained(tmp_path / "model_cards" / "digits-elbo")
    class_pipe = VDMPipeline(
        small_unet(num_class_embeds=10), VDMScheduler(beta_schedule="log_snr_linear"), num_levels=17
    )
    class_pipe.save_pretrained(tmp_path / "model_cards" / "digits-class")
    names, skipped, ran = page_names(page, tmp_path), [], 0
    for line, why, code in blocks(page):
        if why:
            skipped.append(f"{page.name}:{line} ({why})")
            continue
        if (
            page.name == "conditioning.md"
        ):  # "everything here composes": one block is of models with classes, the others of any
            classes = {"num_class_embeds": 10} if "class_labels" in code else {}
            names["pipe"] = quick(VDMPipeline(small_unet(**classes), names["scheduler"], num_levels=17))
        # the line numbers of the page, should it fail
        exec(compile("\n" * line + code, str(page), "exec"), names)
        ran += 1
    assert ran > 0 and ran + len(skipped) == len(blocks(page))  # what a block raises has failed the test already
    record_property("blocks not run", skipped)
    if skipped:
        warnings.warn(f"not run: {'; '.join(skipped)}", stacklevel=1)


def test_what_is_not_run_is_named():
    """The whole list, so that nothing joins it unseen."""
    reasons = {page.name: [why for _, why, _ in blocks(page) if why] for page in PAGES}
    assert {name: found for name, found in reasons.items() if found} == {
        "comparing.md": ["downloads a model"],
        "hub.md": ["needs a login", "needs a login", "downloads a model"],
    }


def test_the_readme_and_the_pages_have_code():
    assert sum(len(blocks(page)) for page in PAGES) >= 15


def test_links_between_pages_and_files_lead_somewhere():
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            if "://" in target or target.startswith(("reference/", "model_cards/")):
                continue
            assert (page.parent / target).exists(), f"{page.name}: {target}"
