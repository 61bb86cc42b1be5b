"""Every file of conf/ composes, names things that exist, and explains itself."""

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


def test_every_key_of_the_main_config_has_a_comment():
    lines = (CONF / "config.yaml").read_text("utf-8").split("\nhydra:")[0].splitlines()
    bare = {line.split(":")[0].strip() for line in lines if ":" in line and "#" not in line}
    sections = {"defaults", "patch", "data", "evaluate", "enabled"}
    as_in_sft = {"steps", "batch_size", "lr", "warmup", "decay", "betas", "clip"}  # dpo's, which sft's explain
    assert bare - sections - as_in_sft - {"weight_decay", "sampling"} == set()


@pytest.mark.parametrize("path", sorted(CONF.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_file_opens_with_what_it_is(path: Path):
    first = path.read_text("utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert len(first.split()) >= 3
