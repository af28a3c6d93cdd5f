"""The objectives by name: an objective is one new file here and one line below."""

from jaxpt.objectives.causal_lm import CausalLM
from jaxpt.objectives.causal_masking import CausalMasking
from jaxpt.objectives.combine import Mixture, Multitask
from jaxpt.objectives.fill_in_the_middle import FillInTheMiddle
from jaxpt.objectives.masked_lm import MaskedLM
from jaxpt.objectives.prefix_lm import PrefixLM
from jaxpt.objectives.replaced_token_detection import ReplacedTokenDetection
from jaxpt.objectives.sentence_pair import SentencePair
from jaxpt.types import ObjectiveConfig

OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "causal_lm": CausalLM,
    "causal_masking": CausalMasking,
    "fill_in_the_middle": FillInTheMiddle,
    "masked_lm": MaskedLM,
    "mixture": Mixture,
    "multitask": Multitask,
    "prefix_lm": PrefixLM,
    "replaced_token_detection": ReplacedTokenDetection,
    "sentence_pair": SentencePair,
}
