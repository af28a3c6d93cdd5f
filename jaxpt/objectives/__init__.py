"""The objectives by name: an objective is one new file here and one line below."""

from jaxpt.objectives.causal_lm import CausalLM
from jaxpt.objectives.masked_lm import MaskedLM
from jaxpt.types import ObjectiveConfig

OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "causal_lm": CausalLM,
    "masked_lm": MaskedLM,
}
