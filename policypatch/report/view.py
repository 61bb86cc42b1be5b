"""Small facts about a run in the words of the page: its title, key figures, timings.

Everything here reads what is there and leaves out what is not, since the page must render for a run of
an older version, a run without a package, or a run that was cut short.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from policypatch.report.wording import is_number


@dataclass(frozen=True)
class Timing:
    """One stage's time and its share of the longest one, for the length of its bar."""

    stage: str
    seconds: float
    percent: float


def get(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, None where any part of it is missing."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def number_at(config: Mapping[str, Any], key: str, otherwise: float) -> float:
    """The number at a dotted key, `otherwise` where there is none."""
    value = get(config, key)
    return value if is_number(value) else otherwise


def risks_of(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The sections of the risks that a run was against; risk=joint has several."""
    risk = get(config, "risk")
    parts = risk.get("parts") if isinstance(risk, Mapping) else None
    if isinstance(parts, Mapping) and parts:
        return [part["risk"] for part in parts.values() if isinstance(part, Mapping) and "risk" in part]
    return [risk] if isinstance(risk, Mapping) else []


def _names(config: Mapping[str, Any]) -> str | None:
    return ", ".join(str(risk["name"]) for risk in risks_of(config) if risk.get("name")) or None


def _teachers(config: Mapping[str, Any]) -> str | None:
    parts = get(config, "risk.parts")
    if not isinstance(parts, Mapping):
        return get(config, "teacher.name")
    return ", ".join(str(get(part, "teacher.name")) for part in parts.values())


def title(config: Mapping[str, Any], folder: str) -> str:
    """What was patched: "Toxicity patch for smollm2-135m"."""
    risk, model = _names(config), get(config, "model.name")
    method = {"lora": "LoRA", "patch": "patch", None: "patch"}.get(
        get(config, "method.name"), get(config, "method.name")
    )
    what = f"{str(risk).replace('_', ' ').capitalize()} {method}" if risk else "Patch"
    return f"{what} for {model}" if model else f"{what}: {config.get('name') or folder}"


def facts(config: Mapping[str, Any], run: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The dozen facts a reader asks for first, as label and value."""
    base, width = manifest.get("base"), manifest.get("width")
    length = manifest.get("length") or get(config, "patch.length")
    pairs = run.get("pairs") or {}
    kept, offered = pairs.get("kept"), pairs.get("prompts")
    seconds = [value for value in (run.get("seconds") or {}).values() if is_number(value)]
    method = get(config, "method.name") or "patch"  # runs of before there were others have no such key
    patched = method == "patch"
    k, prompts = get(config, "evaluate.k"), get(config, "evaluate.prompts")
    found = {
        "Run": config.get("name"),
        "Base": (base.get("id") if isinstance(base, Mapping) else None) or get(config, "model.name"),
        "Risk": _names(config),
        "Teacher": _teachers(config),
        "Method": None if patched else method,
        "Patch": _size(length, width) if patched else None,
        "Start": _start(config) if patched else None,
        "DPO β": get(config, "dpo.beta") if get(config, "dpo.enabled") and (patched or method == "lora") else None,
        "Pairs": _of(kept, offered),
        "Evaluation": f"{prompts or 'all'} prompts of each set" if k else prompts,
        "Seed": config.get("seed"),
        "Time": duration(sum(seconds)) if seconds else None,
        "Version": manifest.get("version"),
    }
    return [
        (label, str(value).replace("_", " ") if label == "Risk" else str(value))
        for label, value in found.items()
        if value is not None
    ]


def _start(config: Mapping[str, Any]) -> str | None:
    kind, text = get(config, "init.kind"), get(config, "init.text")
    return f"{kind} “{text}”" if kind == "text" and text else kind


def _size(length: Any, width: Any) -> str | None:
    if not length:
        return None
    if not width:
        return f"{length} vectors"
    return f"{length} × {width} ({length * width * 4 / 1000:,.0f} kB)"  # float32


def _of(kept: Any, offered: Any) -> str | None:
    if kept is None:
        return None
    return f"{kept} from {offered} prompts" if offered is not None else str(kept)


def flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested object as dotted keys and values, lists on one line; the scorecard is shown elsewhere."""
    pairs: list[tuple[str, str]] = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            pairs += flat(value, f"{prefix}{key}.")
        elif prefix or key != "scorecard":
            is_list = isinstance(value, list)
            pairs.append((f"{prefix}{key}", ", ".join(map(str, value)) if is_list else str(value)))
    return pairs


def duration(seconds: float) -> str:
    """A time span in the two units that matter: 42 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    big, small, names = (whole // 60, whole % 60, ("min", "s"))
    if whole >= 3600:
        big, small, names = (whole // 3600, whole % 3600 // 60, ("h", "min"))
    return f"{big} {names[0]} {small} {names[1]}" if small else f"{big} {names[0]}"


def score_text(score: float) -> str:
    """A score to two places, cut and not rounded: 0.50 is written only of what reaches 0.5."""
    return f"{math.floor(score * 100 + 1e-9) / 100:.2f}"


def timings(seconds: Mapping[str, Any]) -> list[Timing]:
    """The stages in the order they ran."""
    spans = {stage: float(value) for stage, value in seconds.items() if is_number(value)}
    longest = max(spans.values(), default=0.0)
    return [Timing(stage, span, round(100 * span / longest, 1) if longest else 0.0) for stage, span in spans.items()]
