"""Hyper-parameters by Optuna, for two aims at once: less of the risk, and fluent text.

    python experiments/tune.py 20 risk=harmfulness     # 20 trials; what follows are overrides of every one

Hydra's own Optuna plugin (1.3.0) asks for optuna < 3, so this drives today's Optuna itself: every trial is a run of
`run.py` in `outputs/tune/`, and trials go on where an interrupted search stopped. At the end the runs are compared as
a sweep's are; the page's frontier is the Pareto plot, whose points that no other beats are printed here, too.

The best of many trials looks better than it is: they are chosen by the prompts that they are measured on. Measure what
is chosen on others before it is believed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import optuna
import typer
import yaml
from optuna.trial import TrialState
from rich.console import Console

from policypatch.errors import PolicyPatchError
from policypatch.files.atomic import read_json
from policypatch.report.compare import compare, say
from policypatch.report.compare_figures import FLUENCY
from policypatch.report.scorecard import UTILITY, Row, final_arm, groups_of, headline_line

ROOT = Path(__file__).resolve().parent.parent
SPACE = Path(__file__).parent / "tune.yaml"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(context_settings={"ignore_unknown_options": True})
def tune(
    trials: Annotated[int, typer.Argument(help="how many in all, those of an earlier search in the folder included")],
    overrides: Annotated[list[str] | None, typer.Argument(help="overrides of every run")] = None,
    out: Annotated[Path, typer.Option(help="folder of the runs")] = Path("outputs/tune"),
    space: Annotated[Path, typer.Option(help="keys that are searched, and their ranges")] = SPACE,
    seed: Annotated[int, typer.Option(help="of the sampler")] = 0,
) -> None:
    """Search, then compare."""
    searched = yaml.safe_load(space.read_text("utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        directions=["minimize", "minimize"],
        storage=f"sqlite:///{out / 'study.db'}",
        study_name=out.name,
        load_if_exists=True,
    )
    asked = {"overrides": list(overrides or []), "space": searched}
    if study.trials and study.user_attrs.get("asked") != asked:
        raise PolicyPatchError(f"{out} holds a search of other overrides or another space: choose another --out")
    study.set_user_attr("asked", asked)
    for trial in study.get_trials(states=[TrialState.RUNNING]):  # an interrupted search's last one is taken up again
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params)
    done = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    # The same seed would draw the same values again where a search goes on.
    started = len(study.trials)
    study.sampler = optuna.samplers.TPESampler(seed=seed + started, n_startup_trials=min(10, max(2, trials // 2)))

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        chosen = [f"{key}={suggest(trial, key, what)}" for key, what in searched.items()]
        trial.set_user_attr("chosen", chosen)
        folder = out / ",".join(chosen)
        command = [sys.executable, str(ROOT / "run.py"), *(overrides or []), *chosen, f"name={out.name}"]
        if not (folder / "run.json").is_file():
            subprocess.run([*command, f"hydra.run.dir='{folder}'"], check=True)
        return aims(read_json(folder / "scorecard.json"))

    study.optimize(objective, n_trials=max(0, trials - len(done)), catch=(subprocess.CalledProcessError,))
    say(compare([out], out), out)
    console = Console(soft_wrap=True)
    console.print("no other run is better in both:")
    for trial in sorted(study.best_trials, key=lambda trial: trial.values):
        settings = ", ".join(trial.user_attrs["chosen"])
        console.print(f"  {trial.values[0]:.3g}, {trial.values[1]:.3g}: {settings}", markup=False, highlight=False)


def suggest(trial: optuna.Trial, key: str, what: list | dict) -> object:
    """One value: of a list, or of `{low, high}` with `log` and `step` as Optuna has them."""
    if isinstance(what, list):
        return trial.suggest_categorical(key, what)
    options = {name: what[name] for name in ("log", "step") if name in what}
    if isinstance(what["low"], int) and isinstance(what["high"], int):
        return trial.suggest_int(key, what["low"], what["high"], **options)
    return float(f"{trial.suggest_float(key, what['low'], what['high'], **options):.4g}")


def aims(rows: Sequence[Row]) -> tuple[float, float]:
    """The figure that speaks for the run's risk, and what it is bought with, of the run's last arm."""
    arm = final_arm(rows)
    first = groups_of(rows)[0]
    risk = headline_line(first.lines, arm)
    ours = [row for row in rows if row["arm"] == arm and row["risk"] in (first.risk, UTILITY)]
    bought = [row for name in FLUENCY for row in ours if row["metric"] == name]
    if risk is None or arm is None or not bought:
        raise PolicyPatchError(f"a run has no figure for both aims: its risk and one of {', '.join(FLUENCY)}")
    return float(risk.cells[arm]["value"]), float(bought[0]["value"])


if __name__ == "__main__":
    try:
        app()
    except PolicyPatchError as error:
        sys.exit(f"error: {error}")
