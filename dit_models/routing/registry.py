"""The routing ideas by name: a new one is its file and a line here."""

from dit_models.routing.base import Routing
from dit_models.routing.decoupled import Decoupled
from dit_models.routing.diffmoe import DiffMoE
from dit_models.routing.expert_choice import ExpertChoice
from dit_models.routing.expert_race import ExpertRace
from dit_models.routing.loss_free import LossFree
from dit_models.routing.token_choice import TokenChoice

ROUTINGS: dict[str, Routing] = {
    "expert_choice": ExpertChoice(),
    "decoupled": Decoupled(),
    "diffmoe": DiffMoE(),
    "expert_race": ExpertRace(),
    "token_choice": TokenChoice(),
    "loss_free": LossFree(),
}

DEFAULTS = {"ec_dit": "expert_choice", "dit_moe": "token_choice"}
