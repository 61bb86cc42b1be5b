"""Where a patch has changed rejected completions, on a tiny run."""

import sys
from pathlib import Path

import pytest
import torch
from tiny_run import ROOT
from typer.testing import CliRunner

from policypatch.data.pairs import load_pairs
from policypatch.errors import PolicyPatchError
from policypatch.model.backbone import plain_logits
from policypatch.patch.artifact import load

sys.path.insert(0, str(ROOT / "experiments"))
import credit

CUT = "{margin:0.3,chosen_at_most:0.4,rejected_at_least:0.5,min_tokens:2,max_repetition:0.5,cut_rejected:true}"


def test_by_hand():
    assert credit.split([1.0, 2.0, -4.0, 8.0, 16.0], 3) == credit.Credit(3.0, -4.0, 24.0)
    assert credit.split([-5.0], 1) == credit.Credit(0, -5.0, 0)


def test_the_three_parts_are_the_whole_change(go, tiny_base, tmp_path: Path):
    go()
    vectors = load(tmp_path / "run" / "patch").vectors
    changes = []
    for pair in load_pairs(tmp_path / "run" / "pairs.jsonl"):
        tokens = list(pair.rejected.tokens)
        prompt = tiny_base.encode_prompt(pair.prompt)
        both = [
            plain_logits(tiny_base.model, of, prompt, tokens).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])
            for of in (vectors, vectors[:0])
        ]
        changes.append((both[0] - both[1]).sum().item())
    found = credit.credits_of(tmp_path / "run")
    sums = [of.before + of.unsafe + of.after for of in found]
    assert 0 < len(sums) <= len(changes) and any(of.after for of in found)
    assert all(min(abs(total - change) for change in changes) < 1e-4 for total in sums)


def test_nothing_stands_after_it_where_rejected_sides_are_cut(go, tmp_path: Path):
    go(teacher__filter=CUT)
    found = credit.credits_of(tmp_path / "run")
    assert found and not any(of.after for of in found)
    told = CliRunner().invoke(credit.app, [str(tmp_path / "run")])
    assert told.exit_code == 0 and "first unsafe token" in told.output and str(len(found)) in told.output


def test_a_run_without_a_patch_is_refused(go, tmp_path: Path):
    go(method="none")
    with pytest.raises(PolicyPatchError, match=r"patch"):
        credit.credits_of(tmp_path / "run")
