"""What the class labels of a network mean: how many there are, and which of them says "no class"."""

from __future__ import annotations

from typing import Any

# Networks that have one label more than classes; asked by name, since a class from a checkpoint's own code is another
# one.
_WITH_NULL_LABEL = ("VDMUNet2DModel", "VDMMLPModel", "DiTTransformer2DModel")


def num_classes(model: Any) -> int | None:
    """The number K of classes, labels 0..K-1, that a network is conditioned on; None without (or without a config).

    `num_class_embeds` of a `VDMUNet2DModel` or a `UNet2DModel` (also inside a `FourierFeaturesUNet` or an
    `AnalyticStartModel`), `num_embeds_ada_norm` of a
    `DiTTransformer2DModel`.
    """
    config = getattr(model, "config", None)
    if config is None:
        return None
    for inner in ("network_config", "unet_config"):  # a wrapper's, which may hold a wrapper's
        config = config.get(inner, config)
    return config.get("num_class_embeds", config.get("num_embeds_ada_norm"))


def is_class_conditional(model: Any) -> bool:
    """Whether a network can tell classes apart.

    A DiT of one class, which is how it is trained without labels, cannot.
    """
    return num_classes(model) is not None and (num_classes(model) != 1 or default_label(model) is None)


def null_label(model: Any) -> int | None:
    """The label K that means "no class" to the network; None where its table has no such entry."""
    name = type(model).__name__
    if name == "AnalyticStartModel":
        name = model.config.network_class
    return num_classes(model) if name in _WITH_NULL_LABEL else None


def default_label(model: Any) -> int | None:
    """What to pass where no label was given: a DiT wants one always, and "no class" is one it is always trained on;
    else None.
    """
    return num_classes(model) if type(model).__name__ == "DiTTransformer2DModel" else None
