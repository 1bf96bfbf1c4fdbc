"""Makes the package's classes known to Diffusers, so that `DiffusionPipeline.from_pretrained` finds them by name.

A checkpoint says `"_class_name": "VDMPipeline"` and `"scheduler": ["vdm_diffusers", "VDMScheduler"]`. Diffusers (0.42)
looks for the first as an attribute of `diffusers`, and for the library of the second among the modules of
`diffusers.pipelines`; from a repository on the Hub it accepts no other place. It offers no call to add to either, so
attributes are set, here and nowhere else. No attribute of Diffusers is replaced. Should a release look elsewhere, only
these two conveniences end: loading through `VDMPipeline.from_pretrained(local_folder)`, saving, training and sampling
need nothing of this.
"""

from __future__ import annotations

from types import ModuleType


def register_with_diffusers(package: ModuleType, class_names: list[str]) -> None:
    """Set `diffusers.pipelines.<package>` and `diffusers.<ClassName>` for every class, unless something else has the
    name.

    Args:
        package: holds the classes, and `ModelMixin` and `SchedulerMixin`, for which Diffusers asks the module of a
            component.
        class_names: attributes of `package`.
    """
    import diffusers

    for holder, name, value in [
        (diffusers.pipelines, package.__name__, package),
        *((diffusers, name, getattr(package, name)) for name in class_names),
    ]:
        if not hasattr(holder, name):
            setattr(holder, name, value)
