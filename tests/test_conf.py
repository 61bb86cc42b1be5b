"""Every file of conf/ composes, names things that exist, and explains itself."""

import re
from pathlib import Path

import hydra
import pytest
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from tiny_run import ROOT

from policypatch.settings import check

CONF = ROOT / "conf"
OPTIONS = sorted(
    f"{path.parent.name}={path.stem}"
    for path in CONF.glob("*/*.yaml")
    if path.parent.name in {"model", "risk", "teacher", "init", "scorer", "trainer", "logger"}
)
JUDGES = sorted(path.stem for path in (CONF / "judge").glob("*.yaml"))
NEEDED = {"scorer=hub": ["scorer.name=gpt2", "scorer.source.hub=gpt2"]}  # what an option leaves to the user


def compose(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", overrides=list(overrides))
    check(cfg)
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    return cfg


def targets(node: object) -> list[str]:
    if OmegaConf.is_dict(node):
        own = [node._target_] if "_target_" in node else []
        return own + [target for value in node.values() for target in targets(value)]
    return []


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_its_classes_exist(option: str):
    cfg = compose(option, *NEEDED.get(option, []))
    for target in targets(cfg):
        assert get_class(target).__module__.startswith("policypatch.")


@pytest.mark.parametrize("judge", JUDGES)
def test_every_judge_joins_a_risk_with_the_arguments_its_class_has(judge: str):
    import inspect

    cfg = compose(f"+judge@risk.judges.extra={judge}").risk.judges
    assert set(cfg) == {"svm", "bilstm", "extra"}
    signature = inspect.signature(get_class(cfg.extra._target_))
    given = {key: value for key, value in cfg.extra.items() if key != "_target_"}
    signature.bind(**given)
    if "source" in given and signature.parameters["source"].annotation == "str":
        assert isinstance(given["source"], str)


@pytest.mark.parametrize("group", ["teacher", "risk"])
def test_the_arguments_of_every_teacher_and_risk_are_those_of_its_class(group: str):
    import inspect

    for path in sorted((CONF / group).glob("*.yaml")):
        cfg = compose(f"{group}={path.stem}")[group]
        given = {key: None for key in cfg if key != "_target_"}
        inspect.signature(get_class(cfg._target_)).bind(**given)


def model_files() -> list[Path]:
    return sorted((CONF / "model").glob("*.yaml"))


@pytest.mark.parametrize("path", model_files(), ids=lambda path: path.stem)
def test_every_model_says_what_load_base_reads(path: Path):
    cfg = OmegaConf.load(path)
    assert set(cfg) == {"name", "source", "path", "dtype", "device", "attention", "quantize"}
    assert cfg.path is None
    assert len({"wheel", "hub"} & set(cfg.source)) == 1


FILES = sorted([CONF / "config.yaml", *CONF.glob("*/*.yaml")])


def unexplained(text: str) -> list[str]:
    """Keys whose line does not end in a comment.

    The rule: every key has one at the end of its own line. What stands within one line ({...}, [...]) shares that
    line's comment, and what stands within a list ("- ...") shares the comment of the list's key.
    """
    bare, list_depth = [], None
    for line in text.splitlines():
        depth = len(line) - len(line.lstrip())
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if list_depth is not None and depth > list_depth:
            continue
        list_depth = depth if line.lstrip().startswith("- ") else None
        if list_depth is None and not re.search(r" # \w", line):
            bare.append(line.split(":")[0].strip())
    return bare


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_key_has_a_comment(path: Path):
    assert unexplained(path.read_text("utf-8")) == []


def test_a_key_without_a_comment_is_found():
    block = "b:   # block\n  c: 2\n  d: {e: 1}   # both\n  f:   # list\n    - g: 1\n      h: 2\n  i: 3\n"
    text = f"# What it is.\na: 1\n{block}j:\n"
    assert unexplained(text) == ["a", "c", "i", "j"]


@pytest.mark.parametrize("path", sorted(CONF.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_file_opens_with_what_it_is(path: Path):
    first = path.read_text("utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert len(first.split()) >= 3
