"""Every experiment composes with every value that it sweeps, and every kind of job in it runs for a step."""

from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from tiny_run import DROP, ROOT, SECTIONS, composed, overrides, patch_of

from policypatch.command_line import check_overrides
from policypatch.patch.artifact import save
from policypatch.pipeline import run
from policypatch.report.scorecard import final_arm
from policypatch.settings import check

EXPERIMENTS = sorted(path.stem for path in (ROOT / "experiments" / "experiment").glob("*.yaml"))
NAMED = ("length", "beta", "init", "stages", "reference", "lora", "seeds", "headline", "composition")
SPECIALISTS = ("toxicity", "gender_bias", "harmfulness")

ARMS = {  # of experiments/arm/: the method, the arm that the run is about, and LoRA's rank
    "base": ("none", None, None),
    "prompt": ("prompt", "prompt", None),
    "patch": ("patch", "patch", None),
    "lora_r1": ("lora", "lora", 1),
    "lora_r16": ("lora", "lora", 16),
    "teacher": ("teacher", "teacher", None),
}


def text_of(name: str) -> str:
    return (ROOT / "experiments" / "experiment" / f"{name}.yaml").read_text("utf-8")


def values_of(name: str) -> dict[str, list[str]]:
    """Each swept key with its values."""
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = hydra.compose("config", overrides=[f"+experiment={name}"], return_hydra_config=True)
        parser = OverridesParser.create()
        swept = parser.parse_overrides([f"{key}={value}" for key, value in cfg.hydra.sweeper.params.items()])
        return {o.get_key_element(): [str(v) for v in o.sweep_string_iterator()] for o in swept}


def jobs_of(name: str) -> list[list[str]]:
    """As few jobs as hold every value once, but for seeds, of which one is enough."""
    values = {key: known[:1] if key == "seed" else known for key, known in values_of(name).items()}
    rows = zip_longest(*values.values())
    first = [v[0] for v in values.values()]
    return [[f"{k}={v or f}" for k, v, f in zip(values, row, first, strict=True)] for row in rows]


JOBS = [(name, job) for name in EXPERIMENTS for job in jobs_of(name)]


def test_all_that_were_promised_are_there():
    assert set(NAMED) <= set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_its_header_says_the_claim_what_is_expected_and_how_it_is_run(name: str):
    head = [line for line in text_of(name).splitlines() if line.startswith("#")]
    assert any("Expected:" in line for line in head) and any(f"+experiment={name}" in line for line in head)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_is_a_valid_sweep_and_its_folder_has_its_name(name: str):
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        check_overrides([f"+experiment={name}", "+size=small"], multirun=True)
        cfg = hydra.compose("config", overrides=[f"+experiment={name}"])
    assert cfg.name == name


def test_every_arm_is_one_that_is_known():
    assert {path.stem for path in (ROOT / "experiments" / "arm").glob("*.yaml")} == {*ARMS}


@pytest.mark.parametrize("size", [[], ["+size=small"]], ids=["whole", "small"])
@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_is_the_method_and_the_rank_that_it_is_called_by(arm: str, size: list[str]):
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = hydra.compose("config", overrides=["+experiment=lora", *size, f"+arm={arm}"])
    method, _, rank = ARMS[arm]
    assert cfg.method.name == method and rank in (None, cfg.method.get("r"))


@pytest.mark.parametrize(("size", "steps"), [([], 200), (["+size=small"], 60)], ids=["whole", "small"])
def test_a_long_sft_has_as_many_steps_as_dpo_would_have(size: list[str], steps: int):
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = hydra.compose("config", overrides=["+experiment=stages", *size, "+stages=sft_long"])
    assert cfg.sft.steps == cfg.dpo.steps == steps and not cfg.dpo.enabled


@pytest.fixture
def with_patches(tiny_base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the experiments that others build upon leave, in the folders that Hydra gives them."""
    folders = [f"headline/risk={risk},seed=0" for risk in SPECIALISTS] + ["joint/seed=0"]
    folders += [f"policies/+policy={policy}" for policy in ("digits", "quotes", "first_person")]
    for start, folder in enumerate(folders):
        save(patch_of(tiny_base, f"patch{start}", 4 + start, 2), tmp_path / "outputs" / folder / "patch")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("with_patches")
@pytest.mark.parametrize(("name", "job"), JOBS, ids=lambda part: part if isinstance(part, str) else ",".join(part))
def test_every_value_runs_for_a_step(name: str, job: list[str], tiny_base_folder: Path, tmp_path: Path):
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        risk = hydra.compose("config", overrides=[f"+experiment={name}", *job]).risk.name
    risk = risk if risk in SECTIONS else "custom"
    keys = {override.partition("=")[0] for override in job}
    small = {"sft__steps": 1, "dpo__steps": 1, "others": "none", "evaluate__costs": "{prompts:[],batches:[],repeats:1}"}
    if risk == "custom":  # whose policy has a judge: another one takes its place
        made = "{_target_:tiny_run.HashJudge,name:policy,salt:p}"
        small |= {"risk__judge": DROP, "~risk.judge": None, "+risk.judge": made}
    tiny = overrides(tiny_base_folder, tmp_path, risk, **small)
    tiny = [line for line in tiny if line.partition("=")[0] not in keys]
    cfg = composed([*tiny, f"+experiment={name}", *job])
    check(cfg)
    card = run(cfg, tmp_path / "run", ",".join(job), tiny)
    arms = {row.arm for row in card}
    assert "base" in arms and (len(arms) > 1 or "+arm=base" in job)
    for arm, (_, final, _) in ARMS.items():
        assert f"+arm={arm}" not in job or final_arm(map(asdict, card)) == final
    assert name != "growth" or {"digits", "quotes", "first_person"} <= {row.risk for row in card}
    assert (tmp_path / "run" / "report.html").exists()
