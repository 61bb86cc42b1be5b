"""The report of one run: its folder in, one self-contained `report.html` out.

The page needs no network, runs no script and forbids both by its content security policy: half of its
text was written by a model that is being studied for what it should not say.

    write_report(Path("outputs/run"))
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from policypatch.errors import PolicyPatchError
from policypatch.files.atomic import read_json, read_jsonl, write_text
from policypatch.report import scorecard, view, wording
from policypatch.report.costs import cost_label, cost_text, load_text
from policypatch.report.drawing import arm_styles
from policypatch.report.figures import CUTOFF, loss_curves, score_distributions
from policypatch.report.headline import own_sentences, verdict
from policypatch.report.page import render
from policypatch.report.samples import by_split, sections, worst_scores
from policypatch.report.side_effects import side_effects

FILTERS = {
    "readable": scorecard.readable,
    "number": wording.number,
    "bound": wording.bound,
    "p_text": wording.p_text,
    "is_number": wording.is_number,
    "seconds": view.duration,
    "score_text": view.score_text,
    "cost_label": cost_label,
    "cost_text": cost_text,
    "load_text": load_text,
}
FUNCTIONS = {"delta_of": scorecard.delta_of, "effect_of": scorecard.effect_of, "arrow": wording.arrow}


def write_report(run_dir: Path) -> Path:
    """Render the run in `run_dir` and return the path of its `report.html`.

    Needs `config.yaml`, `scorecard.json` and `samples.jsonl`; leaves out what `metrics.csv`, `run.json` and
    `patch/patch.json` would tell where they are missing. Raises PolicyPatchError for a file it cannot read.
    """
    config = _read_config(run_dir / "config.yaml")
    rows = _read_rows(run_dir / "scorecard.json")
    samples = read_jsonl(run_dir / "samples.jsonl")
    run = _read_object(run_dir / "run.json")
    manifest = _read_object(run_dir / "patch" / "patch.json")
    metrics = _read_metrics(run_dir / "metrics.csv")

    arms = scorecard.arms_of([*rows, *samples])
    final = scorecard.final_arm(rows)
    own, others = scorecard.own_and_others(scorecard.groups_of(rows))
    risk = next(iter(view.risks_of(config)), {})  # the first speaks for the run
    older = view.number_at(config, "risk.settings.threshold", CUTOFF)  # where runs before 0.2 have it
    threshold = view.number_at(risk, "threshold", older)
    first = next(iter(by_split(samples, own)), None)
    shown = sections(samples, own, arms, final, threshold, bool(risk.get("chat")))
    level = view.number_at(config, "evaluate.level", scorecard.LEVEL)
    html = render(
        "run.html",
        FILTERS,
        FUNCTIONS,
        title=view.title(config, run_dir.name),
        own_sentences=own_sentences(rows, level),
        verdict=verdict(rows, level),
        side_effects=side_effects(rows, level),
        facts=view.facts(config, run, manifest),
        arms=arms,
        styles=arm_styles(arms),
        final=final,
        groups=own,
        others=scorecard.by_risk(others),
        costs=scorecard.costs_of(rows),
        own_arms=_arms_in(own),
        other_arms=_arms_in(others),
        any_filter=any(row.get("filter") for row in rows),
        unjudged=scorecard.unjudged(rows),
        any_bound=any(wording.is_number(row.get("upper")) for row in rows),
        losses=loss_curves(metrics),
        distributions=score_distributions(worst_scores(first[1], arms) if first else {}, threshold),
        sections=shown,
        cutoff=threshold,
        level=wording.percent(level),
        numeric_level=level,
        alpha=f"{1 - level:.6g}",
        config_text=(run_dir / "config.yaml").read_text(encoding="utf-8"),
        manifest=view.flat(manifest),
        versions=run.get("versions") or {},
        pairs=view.flat(run.get("pairs") or {}),
        cache=run.get("cache") or {},
        command=run.get("command"),
        started=run.get("started"),
        timings=view.timings(run.get("seconds") or {}),
    )
    path = run_dir / "report.html"
    write_text(path, html)
    return path


def _arms_in(groups: Sequence[scorecard.Group]) -> list[str]:
    return scorecard.arms_of(row for group in groups for line in group.lines for row in line.cells.values())


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PolicyPatchError(f"cannot read {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PolicyPatchError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise PolicyPatchError(f"{path} does not hold a mapping of config keys")
    return config


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = read_json(path)
    if not isinstance(rows, list):
        raise PolicyPatchError(f"{path} does not hold a list of rows")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not {"arm", "metric", "value"} <= row.keys():
            raise PolicyPatchError(f"{path}, row {number}: expected an object with arm, metric and value")
    return rows


def _read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise PolicyPatchError(f"{path} does not hold an object")
    return content


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = {"stage", "step", "metric", "value"} - set(reader.fieldnames or ())
        if missing:
            raise PolicyPatchError(f"{path} lacks the column {', '.join(sorted(missing))}")
        rows = []
        for number, row in enumerate(reader, start=2):
            try:
                rows.append({**row, "step": float(row["step"]), "value": float(row["value"])})
            except (TypeError, ValueError):
                raise PolicyPatchError(f"{path}, line {number}: step and value must be numbers") from None
    return rows
