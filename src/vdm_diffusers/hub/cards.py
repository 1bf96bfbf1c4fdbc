"""Model cards: the page that a published repository shows."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

from diffusers.utils import logging
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vdm_diffusers.hub.measurements import Measurement, ModelDescription, Provenance, redact

logger = logging.get_logger(__name__)

HUB_NAMESPACE: str | None = None
"""Where the models of `model_cards/` live on the Hub. While it is None they are loaded from that folder of a
checkout.
"""
PICTURES = (".png", ".jpg", ".jpeg", ".svg", ".gif")


def model_location(name: str) -> str:
    """What `from_pretrained` is given for the model of `model_cards/<name>`: its Hub id once published, else the
    folder.
    """
    return f"{HUB_NAMESPACE}/{name}" if HUB_NAMESPACE else f"model_cards/{name}"


def index_file(folder: pathlib.Path) -> pathlib.Path:
    """What names the class: a pipeline's model_index.json, or a model's config.json."""
    pipeline = folder / "model_index.json"
    return pipeline if pipeline.is_file() else folder / "config.json"


def class_name(folder: pathlib.Path) -> str:
    return str(json.loads(index_file(folder).read_text(encoding="utf-8"))["_class_name"])


def write_model_card(folder: str | os.PathLike[str], description: ModelDescription) -> pathlib.Path:
    """Write README.md into the folder of a saved `VDMPipeline`: metadata with the model-index, figures, usage,
    provenance.

    The code in the section on usage runs as printed where `description.location` can be loaded; `publish_folder` puts
    the repository's name there. Raises ValueError if an image is not in the folder.
    """
    folder = pathlib.Path(folder)
    missing = [name for name in description.images if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"`images` must be files in {folder}, got {missing}.")
    usage = _usage(description.location, folder, description.num_inference_steps, published=False)
    data = _card_data(description.license, description.tags)
    data.datasets = list(description.training_data) or None
    data.model_name = description.title
    data.eval_results = [_eval_result(m) for m in description.measurements] or None
    sections = [
        f"# {description.title}",
        description.summary,
        *(f"![{caption}]({name})\n\n*{caption}*" for name, caption in description.images.items()),
        *(["## Likelihood", _figures(description.measurements)] if description.measurements else []),
        "## Usage",
        f"{_USAGE[0]}\n{usage}\n{_USAGE[1]}",
        "## Training",
        description.training,
        _provenance_table(description.provenance, {"time": description.duration}),
        "## Limitations",
        "\n".join(f"- {limitation}" for limitation in description.limitations),
    ]
    path = folder / "README.md"
    card = redact(str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")))
    if (kept := _set_aside(path)) is not None:
        logger.warning(f"{path} was changed by hand: it is kept as {kept.name}.")
    temporary = path.with_suffix(".md.tmp")
    temporary.write_text(f"{card}\n{_MARK.format(_digest(card))}\n", encoding="utf-8")
    temporary.replace(path)
    return path


_MARK = "<!-- written by vdm_diffusers, {} -->"


def _digest(card: str) -> str:
    return hashlib.blake2b(card.strip().encode(), digest_size=8).hexdigest()


def _set_aside(card: pathlib.Path) -> pathlib.Path | None:
    """Rename a card that somebody wrote, or changed since it was written here; the new name, or None."""
    if not card.is_file():
        return None
    text = card.read_bytes().decode("utf-8", errors="replace").rstrip()
    body, _, last = text.rpartition("\n")
    if last == _MARK.format(_digest(body)):
        return None
    number = 1
    while (kept := card.with_name(f"README.kept-{number}.md")).exists():
        number += 1
    return card.rename(kept)


_USAGE = ("<!-- usage: written by vdm_diffusers -->", "<!-- end of usage -->")


def _card_data(license: str | None, tags: Sequence[str] = ()) -> ModelCardData:
    return ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=sorted({"diffusers", "vdm-diffusers", "variational-diffusion-model", *tags}),
    )


def _eval_result(m: Measurement) -> EvalResult:
    return EvalResult(
        task_type="unconditional-image-generation",
        task_name="Density estimation",
        dataset_type=m.data.identifier,
        dataset_name=m.data.name,
        dataset_config=m.data.config,
        dataset_split=m.data.split,
        dataset_revision=m.data.version
        if re.fullmatch(r"[0-9a-f]{40}", m.data.version)
        else None,  # a commit, or none
        metric_type="bits_per_dim",
        metric_name=f"bits/dim ({m.method}{', upper bound' if m.is_bound else ''})",
        metric_value=round(float(m.bits_per_dim), 6),
        metric_args={
            "standard_error": float(m.standard_error),
            "sampling_error": None if m.sampling_error is None else float(m.sampling_error),
            "method": m.method,
            "is_bound": m.is_bound,
            "num_steps": "continuous time" if m.num_steps is None else m.num_steps,
            **({} if m.log_snr_max is None else {"log_snr_max": float(m.log_snr_max)}),
            **({} if m.log_snr_min is None else {"log_snr_min": float(m.log_snr_min)}),
            "num_images": m.data.num_images,
            "data_version": m.data.version,
            "num_model_evaluations": m.num_model_evaluations,
            "command": m.provenance.command,
            "seed": m.provenance.seed,
            "versions": dict(m.provenance.versions),
            "machine": m.provenance.machine,
            "date": m.provenance.date,
        },
    )


def _figures(measurements: Sequence[Measurement]) -> str:
    rows = [
        "| data | bits/dim | prior + diffusion + reconstruction | method | end points (log SNR) |",
        "|---|---|---|---|---|",
    ]
    for m in measurements:
        terms = (m.prior, m.diffusion, m.reconstruction)
        split = " + ".join(f"{term:.4f}" for term in terms if term is not None) or "-"
        steps = "" if m.num_steps is None else f", {m.num_steps} steps"
        data = _cell(f"{m.data.name} {m.data.version}, {m.data.split}, {m.data.num_images} images")
        bound = "≤ " if m.is_bound else ""
        ends = "-" if m.log_snr_max is None else f"{m.log_snr_max:g}, {m.log_snr_min:g}"
        rows.append(f"| {data} | {bound}{m.bits_per_dim:.4f} ± {m.error:.4f} | {split} | {m.method}{steps} | {ends} |")
    errors = [
        (
            f"The error is the estimator's own: one image says nothing of others ({m.standard_error:.2g}).\n\n"
            if m.sampling_error is None
            else f"The error combines the estimator's own ({m.standard_error:.2g}) with that between images "
            f"({m.sampling_error:.2g}).\n\n"
        )
        + _provenance_table(m.provenance, {"model evaluations": str(m.num_model_evaluations)})
        for m in measurements
    ]
    return "\n".join(rows) + "\n\n" + "\n\n".join(errors)


def _provenance_table(provenance: Provenance, more: Mapping[str, str]) -> str:
    rows = {
        "command": f"`{provenance.command}`",
        "seed": str(provenance.seed),
        "versions": ", ".join(f"{name} {version}" for name, version in provenance.versions.items()),
        "machine": provenance.machine,
        "date": provenance.date,
        **more,
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())


def _cell(text: str) -> str:
    """Text that keeps to its cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _usage(location: str, folder: pathlib.Path, num_inference_steps: int, published: bool) -> str:
    """How to sample and to evaluate, as code that runs."""
    index = json.loads(index_file(folder).read_text(encoding="utf-8"))
    class_name = index["_class_name"]
    if class_name in ("VariationalAutoencoder", "HierarchicalVAE"):
        size = index["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return "\n".join(
            [
                "With the package `vdm-diffusers` installed:",
                "```python",
                "import torch",
                f"from vdm_diffusers import {class_name}, evaluate_latent_likelihood",
                "",
                f'model = {class_name}.from_pretrained("{location}")',
                f"levels = model.sample(4)  # integers 0 to {index['num_levels'] - 1}",
                f"images = torch.randint({index['num_levels']}, (8, {index['in_channels']}, {height}, {width}))  # "
                "yours in place of noise",
                "report = evaluate_latent_likelihood(model.bound, images)",
                "print(report.bits_per_dim, report.standard_error)",
                "```",
            ]
        )
    if class_name != "VDMPipeline":
        library = "vdm_diffusers" if class_name == "LatentVDMPipeline" else "diffusers"
        load = f'pipe = {class_name}.from_pretrained("{location}")'
        return f"```python\nfrom {library} import {class_name}\n\n{load}\nimages = pipe(batch_size=4).images\n```"
    network = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    size = network.get("sample_size") or 32
    height, width = (size, size) if isinstance(size, int) else size
    classes = network.get("num_class_embeds")
    labels = "class_labels=[0, 0, 0, 0], " if classes else ""
    sample = f"pipe(batch_size=4, {labels}num_inference_steps={num_inference_steps})"
    levels, encoding = index.get("num_levels", 256), index.get("pixel_encoding", "bin_center")
    label_argument = ", class_labels=torch.zeros(8, dtype=torch.long)" if classes else ""
    blocks = [
        "With the package `vdm-diffusers` installed:",
        "```python",
        "from vdm_diffusers import VDMPipeline",
        "",
        f'pipe = VDMPipeline.from_pretrained("{location}")',
        f"images = {sample}.images  # PIL images",
        "```",
        f"Its likelihood of your own images, integers 0 to {levels - 1} (the model knows them as `{encoding}`):",
        "```python",
        "import torch",
        "from vdm_diffusers import evaluate_likelihood",
        "",
        f"images = torch.randint({levels}, (8, {network.get('in_channels', 3)}, {height}, {width}))  # yours in "
        "place of noise",
        f"report = evaluate_likelihood(pipe, images{label_argument})",
        "print(report.bits_per_dim, report.standard_error)",
        "```",
    ]
    if published:
        blocks += [
            "Without it, by the code in this repository (read it first: `trust_remote_code` runs it):",
            "```python",
            "from diffusers import DiffusionPipeline",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("{location}", '
            'custom_pipeline="vdm_diffusers", trust_remote_code=True)',
            f"images = {sample}.images",
            "```",
        ]
    return "\n".join(blocks)


def with_usage(card: str, repo_id: str, folder: pathlib.Path) -> str:
    """The card with its section on usage made for the repository; a card without the marks is left as it is."""
    start, end = card.find(_USAGE[0]), card.find(_USAGE[1])
    if min(start, end) < 0:
        return card
    steps = re.search(r"num_inference_steps=(\d+)", card[start:end])
    usage = _usage(repo_id, folder, int(steps[1]) if steps else 250, published=True)
    return f"{card[: start + len(_USAGE[0])]}\n{usage}\n{card[end:]}"


def short_card(repo_id: str, folder: pathlib.Path) -> str:
    """For a repository that would have no card: what it is and how to use it, and not one figure."""
    return str(
        ModelCard(
            f"---\n{_card_data(None).to_yaml()}\n---\n\n# {repo_id.split('/')[-1]}\n\nA variational diffusion "
            "model.\n\n## Usage\n\n"
            f"{_USAGE[0]}\n{_usage(repo_id, folder, 250, published=True)}\n{_USAGE[1]}\n"
        )
    )
