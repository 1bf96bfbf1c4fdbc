"""Publishing on the Hugging Face Hub: who may push, what is pushed, the code that travels with it, and the model card.

    check_hub_access("me/my-model", private=True)          # before the first training step
    publish_folder("outputs/run", "me/my-model")           # or run_as_future=True, while training goes on
    write_model_card("outputs/run", ModelDescription(...))

A card states figures as `Measurement`s. Each carries its error bars, the data it was measured on, how, and a
`Provenance`; there is no way to write a number without them. What is pushed is the model, its card and its pictures,
and nothing that looks like a token; weights are safetensors.

A published repository loads in three ways: with this package, through Diffusers with this package imported, and
without it, by the code files that `publish_folder` adds (`travelling_code`): the package's own sources in one file,
made when publishing.
"""

from vdm_diffusers.hub.cards import PICTURES as PICTURES
from vdm_diffusers.hub.cards import model_location as model_location
from vdm_diffusers.hub.cards import write_model_card as write_model_card
from vdm_diffusers.hub.measurements import EvaluationData as EvaluationData
from vdm_diffusers.hub.measurements import Measurement as Measurement
from vdm_diffusers.hub.measurements import ModelDescription as ModelDescription
from vdm_diffusers.hub.measurements import Provenance as Provenance
from vdm_diffusers.hub.measurements import redact as redact
from vdm_diffusers.hub.publishing import HUB_ERRORS as HUB_ERRORS
from vdm_diffusers.hub.publishing import check_hub_access as check_hub_access
from vdm_diffusers.hub.publishing import publish_folder as publish_folder
from vdm_diffusers.hub.publishing import replacing_weights as replacing_weights
from vdm_diffusers.hub.travelling import CODE_FILE as CODE_FILE
from vdm_diffusers.hub.travelling import CODE_PATHS as CODE_PATHS
from vdm_diffusers.hub.travelling import travelling_code as travelling_code
from vdm_diffusers.hub.travelling import write_travelling_code as write_travelling_code
