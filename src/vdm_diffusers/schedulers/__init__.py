"""Schedulers: the exact maths of the core behind the interface of Diffusers."""

from .scheduling_vdm import VDMScheduler as VDMScheduler
from .scheduling_vdm import VDMSchedulerOutput as VDMSchedulerOutput
