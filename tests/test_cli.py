import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from policypatch import cli
from policypatch.errors import PolicyPatchError

ROW = {"judge": "refusal", "n": 42, "agreement": 0.875, "agreement_low": 0.7, "agreement_high": 0.95}
TABLES = {
    "refusals": [ROW | {"precision": None, "recall": 0.5, "auc": 0.91, "low": 0.8, "high": 0.99}],
    "ranks": [{"judge": "svm", "n": 993, "spearman": 0.4321}],
}


def test_the_table_fits_80_columns_and_json_holds_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "measured", lambda model: TABLES)
    done = CliRunner().invoke(cli.app, ["judges", "--json", str(tmp_path / "t.json")], terminal_width=200)
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80
    assert "0.88 [0.70, 0.95]" in done.output
    assert "0.432" in done.output
    assert json.loads((tmp_path / "t.json").read_text()) == TABLES


def test_a_judge_that_cannot_be_had_ends_in_one_sentence(monkeypatch):
    def fail(model):
        raise PolicyPatchError("judge svm needs profanity_check, which is not installed: pip install x")

    monkeypatch.setattr(cli, "measured", fail)
    done = CliRunner().invoke(cli.app, ["judges"])
    assert done.exit_code == 2
    assert done.output.strip() == "error: judge svm needs profanity_check, which is not installed: pip install x"


def test_what_a_judge_of_conf_says_is_what_is_told(monkeypatch):
    monkeypatch.delenv("PERSPECTIVE_API_KEY", raising=False)
    with pytest.raises(PolicyPatchError, match="PERSPECTIVE_API_KEY"):
        cli._made(["+judge@judges.perspective=perspective"], "judges", ["perspective"])


def test_judges_of_conf_are_made_in_order():
    made = cli._made(["+judge@judges.a=refusal", "+judge@judges.b=refusal_openings"], "judges", ["b", "a"])
    assert [judge.name for judge in made] == ["openings", "refusal"]
    texts = ["I'm sorry, but I can't help.", "Sure, here it is.", "I won’t do that.", ""]
    for judge in made:
        assert judge.score(texts).tolist() == [0, 1, 0, 0]


@pytest.mark.slow
def test_the_real_table():
    tables = cli.measured(model=False)
    assert [len(rows) for rows in tables.values()] == [2, 2, 2, 2, 2, 3, 2, 2]


def test_the_cache_is_told_and_cleaned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from policypatch.files.cache import content_key, entry

    monkeypatch.setenv("POLICYPATCH_CACHE", str(tmp_path / "kept"))
    for kind, number in (("pairs", 2), ("latency", 1)):
        for i in range(number):
            entry(kind, content_key(i=i), lambda folder: (folder / "a.txt").write_text("x" * 3000) and None, about={})
    said = CliRunner().invoke(cli.app, ["cache"]).stdout
    assert "pairs             2 entries" in said and "latency           1 entry" in said
    assert (
        CliRunner()
        .invoke(cli.app, ["cache", "--clean", "--kind", "pairs", "--older-than-days", "1"])
        .stdout.startswith("0 ")
    )
    assert "freed" in CliRunner().invoke(cli.app, ["cache", "--clean", "--kind", "pairs"]).stdout
    said = CliRunner().invoke(cli.app, ["cache"]).stdout
    assert "latency" in said and "pairs             0" in said
    result = CliRunner().invoke(cli.app, ["cache", "--kind", "none"])
    assert result.exit_code == 2 and "the cache has no 'none': it has latency, pairs" in result.stderr
