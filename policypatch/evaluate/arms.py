"""Every arm of a run under the same probes with the same random numbers: asked, judged, measured, written down."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.measure import rows_of, values_of
from policypatch.evaluate.probes import Bench, Outcome, Probe
from policypatch.evaluate.scorecard import PER_PROMPT, Row, Scorecard
from policypatch.files.atomic import write_json, write_jsonl
from policypatch.model.arm import Arm

log = logging.getLogger(__name__)


def evaluate_arms(
    bench: Bench,
    own: Sequence[Probe],
    others: Sequence[Probe],
    marked: Mapping[str, Collection[str]],
    arms: Sequence[Arm],
    folder: Path,
    ends: Sequence[Arm] | None = None,
) -> Scorecard:
    """Measure every arm and write `scorecard.json`, `samples.jsonl` and `per_prompt.json`.

    Args:
        bench: what is measured with.
        own: probes of the risk that was trained against, for every arm.
        others: probes of the other risks and of utility, for `ends` alone.
        marked: by risk, judges and metrics without one that had a part in training.
        arms: the first one is what the others are compared with.
        folder: the run folder.
        ends: of the arms, those that `others` are asked of; the first and the last.

    Returns:
        the scorecard, the own risk first.
    """
    ends = [arms[0], *arms[1:][-1:]] if ends is None else ends
    rows: list[Row] = []
    samples: list[dict[str, Any]] = []
    values: list[dict[str, Any]] = []
    try:
        for probes, measured_arms in ((own, arms), (others, ends)):
            for probe in probes:
                log.info("%s, %s", probe.risk, probe.split)
                asked = [arm for arm in measured_arms if arm.has_likelihood or not probe.reads_probabilities]
                outcomes = {arm.name: _asked(probe, bench, arm) for arm in asked}
                measured = {arm: outcome.measured for arm, outcome in outcomes.items()}
                rows += rows_of(measured, probe.risk, probe.split, marked.get(probe.risk, ()), bench.settings)
                values += values_of(measured, probe.risk, probe.split)
                samples += [row for outcome in outcomes.values() for row in outcome.samples]
    finally:  # what was measured before a probe failed is not lost
        scorecard = Scorecard(rows)
        scorecard.save(folder / "scorecard.json")
        write_jsonl(folder / "samples.jsonl", samples)
        write_json(folder / PER_PROMPT, values)
    return scorecard


def _asked(probe: Probe, bench: Bench, arm: Arm) -> Outcome:
    try:
        return probe.measure(bench, arm)
    except PolicyPatchError as error:
        error.args = (f"{probe.risk}, {probe.split}, {arm.name}: {error}",)  # and it stays one of its kind
        raise
