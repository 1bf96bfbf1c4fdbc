"""Looks at a checkpoint before anything is built from it: what may be refused is refused before memory or disk is
spent.

Nothing of a checkpoint is executed here or imported because the checkpoint names it, and no tensor is read: of
safetensors
only the header. Sizes are compared three ways: what the configs describe, what the headers say, and what the files
hold. The pipelines' `from_pretrained` call this for folders, and for repositories before their weights are downloaded;
the VAEs' for themselves.
"""

from vdm_diffusers.safety.checks import check_checkpoint as check_checkpoint
from vdm_diffusers.safety.checks import check_model as check_model
from vdm_diffusers.safety.checks import check_repository as check_repository
from vdm_diffusers.safety.configs import UnsafeCheckpointError as UnsafeCheckpointError
from vdm_diffusers.safety.configs import parse_json as parse_json
from vdm_diffusers.safety.locations import HTTP_ERROR as HTTP_ERROR
from vdm_diffusers.safety.locations import OWN_FOLDERS as OWN_FOLDERS
from vdm_diffusers.safety.locations import cache_if_unreachable as cache_if_unreachable
from vdm_diffusers.safety.locations import check_location as check_location
from vdm_diffusers.safety.weights import read_header as read_header
