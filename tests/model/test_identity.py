"""Which settings of a config make another base, and which do not."""

import pytest
import transformers as T

from policypatch.model.base import identify


class NewerConfig(T.LlamaConfig):
    """As a later release of transformers may have it: a setting more."""

    def __init__(self, soft_cap: float | None = None, scales: dict | None = None, **known):
        super().__init__(**known)
        self.soft_cap, self.scales = soft_cap, {"in": 1.0, "out": 1.0} | (scales or {})


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({}, False),
        ({"soft_cap": 30.0}, True),
        ({"scales": {"out": 2.0}}, True),
        ({"hidden_size": 128}, True),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, True),
    ],
)
def test_a_release_that_adds_a_setting_makes_no_other_base(tiny_llama, changes: dict, differs: bool):
    before = identify(tiny_llama, None, "tiny", "local")
    tiny_llama.config = NewerConfig(**(tiny_llama.config.to_dict() | changes))
    assert before.differences(identify(tiny_llama, None, "tiny", "local")) == (["config"] if differs else [])


@pytest.mark.parametrize(
    "change", [{"hidden_size": 128}, {"num_attention_heads": 32}, {"rms_norm_eps": 1e-5}, {"hidden_act": "gelu"}]
)
def test_a_setting_that_changes_makes_another_base(tiny_llama, change: dict):
    before = identify(tiny_llama, None, "tiny", "local")
    tiny_llama.config = T.LlamaConfig(**(tiny_llama.config.to_dict() | change))
    assert before.differences(identify(tiny_llama, None, "tiny", "local")) == ["config"]


def test_what_a_class_without_defaults_says_counts(tiny_llama):
    class Bare(T.LlamaConfig):
        def __init__(self, *, needed: int, **known):
            super().__init__(**known)
            self.needed = needed

    found = []
    for needed in (1, 2, 1):
        tiny_llama.config = Bare(**(tiny_llama.config.to_dict() | {"needed": needed}))
        found.append(identify(tiny_llama, None, "tiny", "local").config)
    assert found[0] == found[2] != found[1]
