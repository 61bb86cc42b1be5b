import sys

import pytest

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.judges import SvmJudge


def test_swearing_scores_above_courtesy():
    pytest.importorskip("profanity_check")
    rude, polite, empty = SvmJudge().score(["you are a stupid idiot", "thank you for the kind letter", ""])
    assert rude > 0.5 > polite > empty == 0.0


def test_fingerprint_names_the_versions():
    pytest.importorskip("profanity_check")
    assert "alt-profanity-check==" in SvmJudge().fingerprint


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "profanity_check", None)
    with pytest.raises(PolicyPatchError, match=r"pip install policypatch\[judges\]"):
        SvmJudge()
