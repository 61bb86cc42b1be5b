"""Judges: what scores a text's toxicity. One file each; adding one is adding a file and an export here."""

from policypatch.evaluate.judges.base import BaseJudge, Judge
from policypatch.evaluate.judges.bilstm import BiLstmJudge
from policypatch.evaluate.judges.hf_classifier import HfClassifierJudge
from policypatch.evaluate.judges.perspective import PerspectiveJudge
from policypatch.evaluate.judges.svm import SvmJudge

__all__ = ["BaseJudge", "BiLstmJudge", "HfClassifierJudge", "Judge", "PerspectiveJudge", "SvmJudge"]
