"""Teachers: where the pairs come from. A teacher is one file here and one YAML in conf/teacher/."""

from policypatch.data.teachers.best_of_n import BestOfN
from policypatch.data.teachers.dataset import DatasetTeacher
from policypatch.data.teachers.guided import GuidedTeacher
from policypatch.data.teachers.hf import HfTeacher
from policypatch.data.teachers.sampled import SampledTeacher
from policypatch.data.teachers.teacher import PairSet, Teacher, TeacherContext, joined

__all__ = [
    "BestOfN",
    "DatasetTeacher",
    "GuidedTeacher",
    "HfTeacher",
    "PairSet",
    "SampledTeacher",
    "Teacher",
    "TeacherContext",
    "joined",
]
