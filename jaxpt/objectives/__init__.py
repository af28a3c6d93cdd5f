"""The objectives by name: an objective is one new file here and one line below."""

from jaxpt.objectives.blank_infilling import BlankInfilling
from jaxpt.objectives.causal_lm import CausalLM
from jaxpt.objectives.causal_masking import CausalMasking
from jaxpt.objectives.combine import Mixture, Multitask
from jaxpt.objectives.consistency import Consistency
from jaxpt.objectives.contrastive_lm import ContrastiveLM
from jaxpt.objectives.cpc import CPC
from jaxpt.objectives.declutr import DeCLUTR
from jaxpt.objectives.denoising import Denoising
from jaxpt.objectives.fill_in_the_middle import FillInTheMiddle
from jaxpt.objectives.gap_sentences import GapSentences
from jaxpt.objectives.masked_diffusion import MaskedDiffusion
from jaxpt.objectives.masked_lm import MaskedLM
from jaxpt.objectives.mass import MASS
from jaxpt.objectives.permutation_lm import PermutationLM
from jaxpt.objectives.prefix_lm import PrefixLM
from jaxpt.objectives.replaced_token_detection import ReplacedTokenDetection
from jaxpt.objectives.sentence_pair import SentencePair
from jaxpt.objectives.seq2seq import Seq2Seq
from jaxpt.objectives.simcse import SimCSE
from jaxpt.objectives.span_corruption import SpanCorruption
from jaxpt.objectives.tsdae import TSDAE
from jaxpt.objectives.two_tower import TwoTower
from jaxpt.types import ObjectiveConfig

OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "blank_infilling": BlankInfilling,
    "causal_lm": CausalLM,
    "causal_masking": CausalMasking,
    "consistency": Consistency,
    "contrastive_lm": ContrastiveLM,
    "cpc": CPC,
    "declutr": DeCLUTR,
    "denoising": Denoising,
    "fill_in_the_middle": FillInTheMiddle,
    "gap_sentences": GapSentences,
    "masked_diffusion": MaskedDiffusion,
    "masked_lm": MaskedLM,
    "mass": MASS,
    "mixture": Mixture,
    "multitask": Multitask,
    "permutation_lm": PermutationLM,
    "prefix_lm": PrefixLM,
    "replaced_token_detection": ReplacedTokenDetection,
    "sentence_pair": SentencePair,
    "seq2seq": Seq2Seq,
    "simcse": SimCSE,
    "span_corruption": SpanCorruption,
    "tsdae": TSDAE,
    "two_tower": TwoTower,
}
