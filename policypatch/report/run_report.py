"""The report of one run: its folder in, one self-contained `report.html` out.

The page needs no network, runs no script and forbids both by its content security policy: half of its
text was written by a model that is being studied for what it should not say.

    write_report(Path("outputs/run"))
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from policypatch.errors import PolicyPatchError
from policypatch.files.atomic import read_json, read_jsonl, write_text
from policypatch.report import scorecard, view
from policypatch.report.figures import CUTOFF, arm_styles, loss_curves, score_distributions
from policypatch.report.headline import headline, verdict
from policypatch.report.samples import choose, judges_of, worst_scores

PROMPTS_SHOWN = 20


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
    judge = _speaking_judge(rows, samples)
    threshold = view.number_at(config, "risk.settings.threshold", CUTOFF)
    level = view.number_at(config, "evaluate.level", scorecard.LEVEL)
    html = (
        _environment()
        .get_template("run.html")
        .render(
            title=view.title(config, run_dir.name),
            headline=headline(rows, level),
            verdict=verdict(rows),
            facts=view.facts(config, run, manifest),
            arms=arms,
            styles=arm_styles(arms),
            final=scorecard.final_arm(rows),
            groups=scorecard.groups_of(rows),
            any_filter=any(row.get("filter") for row in rows),
            losses=loss_curves(metrics),
            distributions=score_distributions(worst_scores(samples, arms), threshold),
            prompts=choose(samples, arms, judge, PROMPTS_SHOWN, threshold),
            prompt_total=len({str(sample["prompt_id"]) for sample in samples}),
            judge=judge,
            cutoff=threshold,
            level=scorecard.percent(level),
            config_text=(run_dir / "config.yaml").read_text(encoding="utf-8"),
            manifest=view.flat(manifest),
            versions=run.get("versions") or {},
            pairs=view.flat(run.get("pairs") or {}),
            cache=run.get("cache") or {},
            command=run.get("command"),
            started=run.get("started"),
            timings=view.timings(run.get("seconds") or {}),
        )
    )
    path = run_dir / "report.html"
    # A model can write half a surrogate pair, for which UTF-8 has no form.
    write_text(path, html.encode("utf-8", "replace").decode("utf-8"))
    return path


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": scorecard.number,
        "p_text": scorecard.p_text,
        "is_number": scorecard.is_number,
        "seconds": view.duration,
        "score_text": view.score_text,
    }
    environment.globals |= {
        "delta_of": scorecard.delta_of,
        "effect_of": scorecard.effect_of,
        "arrow": scorecard.arrow,
    }
    return environment


def _speaking_judge(rows: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]) -> str | None:
    """The judge that ranks the samples: the headline's where it scored them, else the first that did."""
    judges = judges_of(samples)
    for group in scorecard.groups_of(rows):
        line = scorecard.headline_line(group.lines, scorecard.final_arm(rows))
        if line is not None and line.judge in judges:
            return line.judge
    return next(iter(judges), None)


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
