"""Probes: what an arm is measured with, each one kind of question on one set of prompts."""

from policypatch.evaluate.probes.gender import CrowsPairsProbe, NextWordProbe
from policypatch.evaluate.probes.probe import Bench, Outcome, Plan, Probe, Reading, half
from policypatch.evaluate.probes.sampled import SampledProbe
from policypatch.evaluate.probes.utility import BenignKLProbe, TextPerplexityProbe

__all__ = [
    "Bench",
    "BenignKLProbe",
    "CrowsPairsProbe",
    "NextWordProbe",
    "Outcome",
    "Plan",
    "Probe",
    "Reading",
    "SampledProbe",
    "TextPerplexityProbe",
    "half",
]
