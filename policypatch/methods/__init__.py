"""Methods: what adapts the base. A method is one file here and one YAML in conf/method/."""

from policypatch.methods.lora import LoRAMethod
from policypatch.methods.method import Method, Trained, Untrained
from policypatch.methods.patch import PatchMethod
from policypatch.methods.stack import StackMethod, StacksMethod
from policypatch.methods.untrained import NoMethod, PromptMethod, TeacherMethod

__all__ = [
    "LoRAMethod",
    "Method",
    "NoMethod",
    "PatchMethod",
    "PromptMethod",
    "StackMethod",
    "StacksMethod",
    "TeacherMethod",
    "Trained",
    "Untrained",
]
