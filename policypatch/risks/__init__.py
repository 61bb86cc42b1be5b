"""Risks: each names its prompts, its judges, its metrics and its headline. One file here and one YAML in conf/risk/."""

from policypatch.risks.toxicity import Toxicity

__all__ = ["Toxicity"]
