"""What a profile is asked for: mistakes told before anything is computed."""

import pytest

from kvzip.evaluation.profile import Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.0}, "ratio must be"),
        ({"level": "pear"}, "did you mean 'pair'"),
        ({"bits": 3}, r"bits must be one of \(16, 8, 4\)"),
        ({"scorer": "kvzup"}, "did you mean 'kvzip'"),
        ({"kv_type": "evcit"}, "unknown kv_type 'evcit'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"load_score": True, "level": "pair"}, "level must be 'head'"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_computed(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_the_level_is_the_scorers_own_unless_it_is_given():
    assert Settings().level == "pair"
    assert Settings(scorer="keydiff").level == "pair-uniform"
    assert Settings(scorer="keydiff", level="pair").level == "pair"
    assert Settings(load_score=True).level == "head"
