"""Schedulers: the exact maths of the core behind the interface of Diffusers."""

from .scheduling_flow import VDMFlowScheduler as VDMFlowScheduler
from .scheduling_flow import VDMFlowSchedulerOutput as VDMFlowSchedulerOutput
from .scheduling_sigma import VDMSigmaScheduler as VDMSigmaScheduler
from .scheduling_vdm import VDMScheduler as VDMScheduler
from .scheduling_vdm import VDMSchedulerOutput as VDMSchedulerOutput
