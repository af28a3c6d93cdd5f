import dataclasses

import pytest

from jaxpt.models import presets
from jaxpt.models.encoder_decoder import EncoderDecoderConfig
from jaxpt.models.transformer import TransformerConfig


@pytest.mark.parametrize(
    "family", ["bert", "roberta", "albert", "electra", "xlnet", "glm", "gpt2", "llama", "modernbert", "t5", "bart"]
)
def test_an_unknown_size_is_answered_with_the_known_ones(family):
    with pytest.raises(ValueError, match=rf"{family}.*'huge'.*(base|small|7b)"):
        getattr(presets, family)("huge")


def test_unknown_version_of_t5():
    with pytest.raises(ValueError, match=r"'2.0'.*1.0, 1.1"):
        presets.t5("base", "2.0")


def test_changes_reach_both_stacks():
    config = presets.t5("small", remat="full")
    assert (config.encoder.remat, config.decoder.remat) == ("full", "full")
    assert (config.encoder.relative_causal, config.decoder.relative_causal) == (False, True)


def test_stacks_that_do_not_fit():
    stack = TransformerConfig(depth=1, width=8, heads=2)
    with pytest.raises(ValueError, match="one width"):
        EncoderDecoderConfig(stack, dataclasses.replace(stack, width=16))
