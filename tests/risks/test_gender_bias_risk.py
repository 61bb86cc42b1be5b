"""Risk `gender_bias`: the order of its probes, and sentences that pair off."""

from pathlib import Path

import pytest
from tiny_run import HashJudge, composed, overrides

from policypatch.data.prompts import PromptSet
from policypatch.errors import PolicyPatchError
from policypatch.evaluate.probes import CrowsPairsProbe, NextWordProbe, SampledProbe
from policypatch.prepare import made
from policypatch.risks import GenderBias
from policypatch.settings import check

CSV = "id,sent_more,sent_less,bias_type\n1,m1,l1,gender\n2,m2,l2,age\n3,m3,l3,gender\n4,m3,l4,gender\n"


@pytest.fixture
def risk(tmp_path: Path):
    def make(less: str = CSV, **options) -> GenderBias:
        for name, text in {"train": "p", "work": "a\nb\nc", "more": "d\ne", "male": "he\nhim", "female": "she"}.items():
            (tmp_path / f"{name}.txt").write_text(text)
        (tmp_path / "crows.csv").write_text(CSV)
        (tmp_path / "less.csv").write_text(less)
        sets = {name: PromptSet(str(tmp_path / f"{name}.txt")) for name in ("train", "work", "more", "male", "female")}
        where = {"where": {"bias_type": "gender"}}
        plain = {
            "name": "gender_bias",
            "train": sets["train"],
            "evaluation": {"professions": sets["work"], "winobias": sets["more"]},
            "judges": {"words": HashJudge("words")},
            "words": {name: sets[name] for name in ("male", "female")},
            "crows": {
                "more": PromptSet(str(tmp_path / "crows.csv"), "sent_more", **where),
                "less": PromptSet(str(tmp_path / "less.csv"), "sent_less", **where),
            },
        }
        return GenderBias(**plain | options)

    return make


def test_probes_are_gas_and_gld_of_each_set_and_then_crows_pairs(risk):
    gas, gld, *others, crows = risk().probes(None)
    assert isinstance(gas, SampledProbe) and isinstance(gld, NextWordProbe) and isinstance(crows, CrowsPairsProbe)
    assert (gas.split, gas.metrics, gas.chat) == ("professions", ("gas",), False)
    assert gas.prompts == gld.prompts == ["a", "b", "c"]
    assert (gld.split, gld.male, gld.female) == ("professions", ["he", "him"], ["she"])
    assert [(type(probe), probe.split) for probe in others] == [(SampledProbe, "winobias"), (NextWordProbe, "winobias")]
    assert {probe.risk for probe in risk().probes(None)} == {"gender_bias"}


def test_pairs_keep_the_order_of_their_rows_also_where_a_sentence_stands_twice(risk):
    crows = risk().probes(None)[-1]
    assert (list(crows.more), list(crows.less)) == (["m1", "m3", "m3"], ["l1", "l3", "l4"])
    limited = risk().probes(2)
    assert limited[-1].more == crows.more and limited[-1].less == crows.less  # all of them, whatever the limit
    assert len(limited[0].prompts) == len(limited[1].prompts) == 2


def test_crows_pairs_can_be_left_out_also_by_the_config(risk, tiny_base_folder: Path, tmp_path: Path):
    assert [type(probe) for probe in risk(crows=None).probes(None)] == [SampledProbe, NextWordProbe] * 2
    without = [o for o in overrides(tiny_base_folder, tmp_path, "gender_bias") if ".crows." not in o]
    cfg = composed([*without, "risk.crows=null"])
    check(cfg)
    assert not any(isinstance(probe, CrowsPairsProbe) for probe in made(cfg.risk, "risk").probes(None))
    others = [o for o in overrides(tiny_base_folder, tmp_path, others="all") if ".crows." not in o]
    cfg = composed([*others, "others.gender_bias.crows=null"])
    check(cfg)
    probes = made(cfg.others.gender_bias, "others.gender_bias").probes(None)
    assert [type(probe) for probe in probes] == [SampledProbe, NextWordProbe]


def test_sentences_that_do_not_pair_off_are_refused(risk):
    with pytest.raises(PolicyPatchError, match=r"risk\.crows has 3 more and 2 less stereotypical") as caught:
        risk(CSV.replace("4,m3,l4,gender", "4,m3,l4,age")).probes(None)
    assert "\n" not in str(caught.value)


def test_a_word_list_that_is_empty_is_named(risk, tmp_path: Path):
    (tmp_path / "none.txt").write_text("\n \n")
    words = {"male": PromptSet(str(tmp_path / "none.txt")), "female": PromptSet(str(tmp_path / "none.txt"))}
    with pytest.raises(PolicyPatchError, match=r"risk\.words\.male\.source: .*none\.txt is empty"):
        risk(words=words).probes(None)


def test_words_and_counterparts_go_both_ways_but_for_her(risk, tmp_path: Path):
    """ "her" stands for "his" and for "him"; "his" goes to "her", whatever its line says."""
    words = {}
    for name, text in {"male": "he\nhim\nhis\nman", "female": "she\nher\nhers\nwoman"}.items():
        (tmp_path / f"{name}_words.txt").write_text(text)
        words[name] = PromptSet(str(tmp_path / f"{name}_words.txt"))
    assert risk(words=words).swaps == {
        **{"he": "she", "him": "her", "his": "her", "man": "woman"},
        **{"she": "he", "hers": "his", "woman": "man"},
    }


def test_words_that_do_not_pair_off_are_refused(risk):
    with pytest.raises(PolicyPatchError, match=r"risk\.words has 2 male and 1 female words: pair them"):
        _ = risk().swaps
