"""A command line that cannot work is refused in one sentence, before any job starts."""

import re
from collections.abc import Iterator

import hydra
import pytest
from tiny_run import ROOT

from policypatch.command_line import check_overrides, has_no_name, left_out_of_names, spelt_out
from policypatch.errors import PolicyPatchError
from policypatch.settings import check


@pytest.fixture(autouse=True)
def conf() -> Iterator[None]:
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


def refusal(*arguments: str, multirun: bool = False) -> str:
    with pytest.raises(PolicyPatchError) as caught:
        check_overrides(arguments, multirun)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["patch.length=7", "dpo.beta=0.5"],
        ["model=llama3_8b", "teacher=dataset", "teacher.source=pairs.jsonl"],
        ["init=random", "init.scale=2.0"],
        ["init.text='Be kind, always'"],
        ["init=patch", "init.folder=older/patch"],
        ["scorer=hub", "scorer.name=gpt2", "scorer.source.hub=gpt2"],
        ["scorer=base", "+scorer.path=/tmp/x"],
        ["+judge@risk.judges.bert=hf"],
        ["~risk.judges.bilstm", "teacher.judges=[svm]"],
        ["risk.train.source=/some/file.jsonl"],
        ["hydra.run.dir=/tmp/x"],
        ["dpo.reference=base", "sft.enabled=false"],
        ["dpo.enabled=false"],
        ["evaluate.prompts=null"],
        ["evaluate.sampling.temperature=0", "evaluate.sampling.min_new_tokens=20", "evaluate.sampling.top_p=1"],
        ["teacher.filter.margin=0", "teacher.filter.min_tokens=0", "teacher.filter.chosen_at_most=1"],
        ["risk.train.limit=5", "risk.train.take=all"],
        ["name=sweeps/a-b_c.1/x..y"],
        ["trainer=gpu"],
        ["risk=harmfulness", "teacher=guarded", "kl.weight=0.1", "kl.rows=all", "data.benign_share=null"],
        ["risk=harmfulness", "+set@risk.scary=xstest", "+judge@risk.judges.extra=llama_guard", "risk.near=null"],
        ["risk=gender_bias", "eval=full", "others=none", "dpo.reference=teacher"],
        ["risk=custom", "risk.prompts=mine.jsonl", "risk.judge={words: [Acme, Emca]}", "risk.chat=true"],
        ["risk=custom", "risk.prompts=mine.jsonl", "+judge@risk.judge=hf", "+judge@risk.extra.more=refusal"],
        ["teacher=hf", "teacher.model.source.hub=org/name", "teacher.model.name=name"],
        ["~others.toxicity", "~others.utility"],
        ["~recipe", "risk=harmfulness"],
    ],
)
def test_what_users_write_is_accepted(arguments: list[str]):
    check_overrides(arguments, multirun=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["patch.length=2,3,4", "dpo.beta=0.1,0.5"],
        ["patch.length=range(1,5)"],
        ["init=text,vocab,random"],
        ["init.text='a, b','c, d'"],
        ["model=glob(*)"],
        ["teacher=dataset,best_of_n"],
        ["+judge@risk.judges.more=hf,perspective"],
        ["sft.betas=[0.9,0.95],[0.9,0.99]"],
        ["risk=toxicity,gender_bias,harmfulness"],
        ["risk=harmfulness", "kl.weight=0,0.1", "data.benign_share=0.25,0.5"],
    ],
)
def test_sweeps_are_accepted(arguments: list[str]):
    check_overrides(arguments, multirun=True)


@pytest.mark.parametrize(
    ("argument", "suggestion"),
    [
        ("patch.lenght=3", "patch.length"),
        ("dpo.bta=0.1", "dpo.beta"),
        ("sed=1", "seed"),
        ("teacher.filter.marign=0.1", "teacher.filter.margin"),
        ("evaluate.sampling.max_new_token=3", "evaluate.sampling.max_new_tokens"),
        ("risk.judges.bilstm.lable=x", "risk.judges.bilstm.label"),
        ("patch.lenght=3,4", "patch.length"),
    ],
)
def test_a_misspelt_key_gets_the_nearest_one(argument: str, suggestion: str):
    message = refusal(argument, multirun=True)
    assert argument.split("=")[0] in message
    assert message.endswith(f"did you mean {suggestion}?")


def test_keys_are_those_of_the_chosen_option():
    check_overrides(["teacher=dataset", "teacher.limit=3"], False)
    assert "teacher.limit" in refusal("teacher.limit=3")
    assert "did you mean teacher.source" in refusal("teacher=dataset", "teacher.sorce=x")
    assert "teacher.n" in refusal("teacher=dataset,best_of_n", "teacher.n=4", multirun=True)


def test_a_key_like_no_other_points_to_the_file():
    assert "conf/config.yaml" in refusal("zzzzqqqq=1")


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("risk=gambling", "custom, gender_bias, harmfulness, joint, toxicity"),
        ("teacher=nobody", "best_of_n, dataset, guarded"),
        ("model=gpt9", "smollm2_135m"),
        ("others=some", "all, none"),
        ("eval=long", "full, quick"),
    ],
)
def test_an_unknown_option_lists_those_there_are(argument: str, options: str):
    message = refusal(argument)
    assert argument.replace("=", "/") in message
    assert options in message
    assert "search path" not in message.lower()
    assert "pkg://" not in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["patch.length=-1"], ["patch.length is -1", "at least 1"]),
        (["patch.length=0"], ["patch.length is 0"]),
        (["patch.length=2.5"], ["patch.length is 2.5", "whole number"]),
        (["patch.length=many"], ["patch.length is 'many'", "number"]),
        (["patch.length=true"], ["patch.length is True", "number"]),
        (["patch.length=null"], ["patch.length is None", "number"]),
        (["dpo.beta=0"], ["dpo.beta is 0", "greater than 0"]),
        (["dpo.beta=-1"], ["dpo.beta is -1"]),
        (["dpo.beta=nan"], ["dpo.beta is nan"]),
        (["sft.lr=inf"], ["sft.lr is inf"]),
        (["sft.lr=0"], ["sft.lr is 0"]),
        (["sft.steps=0"], ["sft.steps is 0"]),
        (["dpo.batch_size=1.5"], ["dpo.batch_size is 1.5", "whole number"]),
        (["dpo.warmup=2"], ["dpo.warmup is 2", "at most 1"]),
        (["dpo.label_smoothing=0.5"], ["dpo.label_smoothing is 0.5", "at most"]),
        (["dpo.decay=slow"], ["dpo.decay is 'slow'", "linear, cosine, constant"]),
        (["dpo.reference=nobody"], ["dpo.reference is 'nobody'", "teacher, sft, base"]),
        (["dpo.betas=[0.9]"], ["dpo.betas", "two numbers"]),
        (["sft.betas=[0.9,1.0]"], ["sft.betas", "two numbers"]),
        (["sft.enabled=maybe"], ["sft.enabled is 'maybe'", "true or false"]),
        (["sft.enabled=false", "dpo.enabled=false"], ["sft.enabled and dpo.enabled are both false"]),
        (["sft.enabled=false", "dpo.reference=sft"], ["dpo.reference=sft needs stage 1"]),
        (["data.held_out=0.95"], ["data.held_out is 0.95", "at most"]),
        (["evaluate.k=2", "evaluate.ppl_samples=3"], ["evaluate.ppl_samples is 3", "evaluate.k (2)"]),
        (["evaluate.level=95"], ["evaluate.level is 95"]),
        (["evaluate.resamples=10"], ["evaluate.resamples is 10", "at least 100"]),
        (["evaluate.sampling.top_p=0"], ["evaluate.sampling.top_p is 0"]),
        (["evaluate.sampling.top_p=1.1"], ["evaluate.sampling.top_p is 1.1"]),
        (["evaluate.sampling.temperature=-1"], ["evaluate.sampling.temperature is -1"]),
        (["evaluate.sampling.max_new_tokens=0"], ["evaluate.sampling.max_new_tokens is 0"]),
        (["evaluate.sampling=3"], ["evaluate.sampling"]),
        (["evaluate.sampling=null"], ["evaluate.sampling is None", "temperature, top_p"]),
        (["evaluate.sampling.top_p=foo"], ["evaluate.sampling.top_p is 'foo'", "number, greater than 0 and at most 1"]),
        (["evaluate.sampling.min_new_tokens=50"], ["evaluate.sampling.min_new_tokens is 50", "max_new_tokens (20)"]),
        (["+evaluate.sampling.top_k=5"], ["no key evaluate.sampling.top_k", "temperature, top_p"]),
        (["evaluate.prompts=ten"], ["evaluate.prompts is 'ten'", "whole number, at least 1, or null"]),
        (["evaluate.prompts=0"], ["evaluate.prompts is 0"]),
        (["evaluate.prompts=1.5"], ["evaluate.prompts is 1.5", "whole number"]),
        (["teacher.sampling.top_p=-1"], ["teacher.sampling.top_p is -1", "greater than 0 and at most 1"]),
        (["teacher.sampling.max_new_tokens=0"], ["teacher.sampling.max_new_tokens is 0", "at least 1"]),
        (["teacher.sampling.temperature=-0.1"], ["teacher.sampling.temperature is -0.1", "at least 0"]),
        (["+teacher.sampling.top_k=5"], ["no key teacher.sampling.top_k", "temperature, top_p"]),
        (["teacher.filter.margin=foo"], ["teacher.filter.margin is 'foo'", "number, at least 0 and at most 1"]),
        (["teacher.filter.per_prompt=-1"], ["teacher.filter.per_prompt is -1", "at least 1"]),
        (["+teacher.filter.most=1"], ["no key teacher.filter.most", "margin, chosen_at_most"]),
        (["risk.train.limit=-3"], ["risk.train.limit is -3", "at least 1, or null"]),
        (["+risk.evaluation.rtp.limit=many"], ["risk.evaluation.rtp.limit is 'many'", "whole number"]),
        (["risk.evaluation.bold.limit=0"], ["risk.evaluation.bold.limit is 0", "at least 1"]),
        (["risk=harmfulness", "+risk.scary.take=half"], ["risk.scary.take is 'half'", "all or first_half"]),
        (["risk=harmfulness", "risk.benign.plain.limit=-1"], ["risk.benign.plain.limit is -1"]),
        (["risk=gender_bias", "+risk.crows.more.filed=x"], ["no key risk.crows.more.filed", "source, field"]),
        (
            ["risk=gender_bias", "risk.evaluation.winobias.before='('"],
            ["risk.evaluation.winobias.before", "expression"],
        ),
        (["+others.toxicity.evaluation.rtp.limit=0"], ["others.toxicity.evaluation.rtp.limit is 0"]),
        (["+others.utility.text.limit=0"], ["others.utility.text.limit is 0"]),
        (["risk.train.take=second_half"], ["risk.train.take is 'second_half'", "all or first_half"]),
        (["~risk.train.source"], ["risk.train.source is not set"]),
        (["risk.threshold=7"], ["risk.threshold is 7", "greater than 0 and less than 1"]),
        (["risk.threshold=1"], ["risk.threshold is 1"]),
        (["risk=harmfulness", "risk.near=0"], ["risk.near is 0", "greater than 0 and at most 1, or null"]),
        (["risk=harmfulness", "risk.near=near"], ["risk.near is 'near'", "number"]),
        (["data.benign_share=1.5"], ["data.benign_share is 1.5", "at most 1, or null"]),
        (["data.benign_share=half"], ["data.benign_share is 'half'", "number"]),
        (["kl.weight=-1"], ["kl.weight is -1", "at least 0"]),
        (["kl.weight=null"], ["kl.weight is None"]),
        (["trainer.recompute=1"], ["trainer.recompute is 1", "true or false"]),
        (["trainer=fsdp", "trainer.compile=true"], ["trainer.compile", "trainer.shard"]),
        (["evaluate.after_sft=maybe"], ["evaluate.after_sft is 'maybe'", "true or false"]),
        (["texts.rows=-1"], ["texts.rows is -1", "at least 0"]),
        (["balance.weight=-0.5"], ["balance.weight is -0.5", "at least 0"]),
        (["kl.rows=some"], ["kl.rows is 'some'", "benign, all"]),
        (["evaluate.responses=0"], ["evaluate.responses is 0", "at least 1"]),
        (["evaluate.other_prompts=0"], ["evaluate.other_prompts is 0", "or null"]),
        (["evaluate.response_sampling.top_p=0"], ["evaluate.response_sampling.top_p is 0"]),
        (["evaluate.response_sampling=null"], ["evaluate.response_sampling is None", "temperature, top_p"]),
        (["init=random", "init.scale=-1"], ["init.scale is -1", "greater than 0"]),
        (["trainer.accelerator=tpu"], ["trainer.accelerator is 'tpu'", "cpu, gpu"]),
        (["name=a/../../b"], ["name is 'a/../../b'", "folder"]),
        (["name=.."], ["name is '..'"]),
        (["name=./a"], ["name is './a'"]),
        (["name=/tmp/a"], ["name is '/tmp/a'"]),
        (["name=a//b"], ["name is 'a//b'"]),
        (["name=a/"], ["name is 'a/'"]),
        (["name='a b'"], ["name is 'a b'"]),
        (["name=null"], ["name is None"]),
        (["seed=-1"], ["seed is -1"]),
        (["trainer.devices=0"], ["trainer.devices is 0", "at least 1"]),
        (["trainer.devices=all"], ["trainer.devices=all", "GPUs"]),
        (["trainer.num_nodes=0"], ["trainer.num_nodes is 0", "at least 1"]),
        (["trainer.checkpoint_every=0"], ["trainer.checkpoint_every is 0"]),
        (["patch.version=one"], ["patch.version is 'one'", "1.0.0"]),
        (["patch.name='My patch'"], ["patch.name is 'My patch'"]),
        (["scorer=hub"], ["scorer.name is not set"]),
        (["risk=custom", "risk.judge=x"], ["risk.prompts is not set"]),
        (["risk=custom", "risk.prompts=x"], ["risk.judge is not set"]),
        (["teacher=hf"], ["teacher.model.name is not set"]),
        (["seed=${nothing}"], ["nothing"]),
        (["patch=3"], ["patch"]),
        (["method=lora", "patch.companions=[outputs/a/patch]"], ["patch.companions", "method=patch"]),
        (["a=b=c"], ["the command line cannot be read"]),
        (["patch.length"], ["the command line cannot be read", "patch.length"]),
    ],
)
def test_a_value_that_no_run_could_use(arguments: list[str], words: list[str]):
    message = refusal(*arguments)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["patch.length=2,3,0"], "patch.length is 0"),
        (["patch.length=2,3", "dpo.beta=0.1,0.2,-1"], "dpo.beta is -1"),
        (["init=text,vocab,rnadom"], "init/rnadom"),
        (["patch.length=range(-1,3)"], "patch.length is -1"),
        (["+judge@risk.judges.more=hf,nobody"], "judge/nobody"),
    ],
)
def test_every_value_of_a_sweep_is_looked_at(arguments: list[str], words: str):
    assert words in refusal(*arguments, multirun=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hydra/launcher=joblib", "trainer.devices=2"], ["hydra/launcher=joblib", "2 devices"]),
        (["hydra/launcher=joblib", "trainer=ddp"], ["hydra/launcher=joblib", "all devices"]),
        (["hydra/launcher=submitit_local", "trainer.devices=2"], ["LocalLauncher", "hydra/launcher=slurm"]),
        (["trainer.num_nodes=2"], ["trainer.num_nodes is 2", "hydra/launcher=slurm"]),
        (["hydra/launcher=slurm", "trainer=ddp"], ["trainer.devices=all"]),
        (["hydra/launcher=submitit_slurm", "trainer.devices=2"], ["hydra.launcher.tasks_per_node is 1", "has 2"]),
        (["hydra/launcher=slurm", "trainer.devices=1,2"], ["hydra.launcher.tasks_per_node is 1", "has 2"]),
        (["hydra/launcher=slurm", "hydra.launcher.nodes=2"], ["hydra.launcher.nodes is 2", "has 1"]),
    ],
)
def test_a_launcher_that_would_not_start_every_rank_is_refused(arguments: list[str], words: list[str]):
    message = refusal(*arguments, multirun=True)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "arguments",
    [
        ["trainer.devices=1,2"],
        ["trainer=ddp"],
        ["hydra/launcher=joblib"],
        ["hydra/launcher=slurm", "trainer.devices=4", "trainer.num_nodes=2"],
    ],
)
def test_a_launcher_that_does_is_not(arguments: list[str]):
    check_overrides(arguments, multirun=True)


def test_several_values_without_m_are_no_sweep():
    message = refusal("patch.length=2,3")
    assert "patch.length" in message
    assert "-m" in message


def test_check_names_the_key_of_a_composed_config():
    cfg = hydra.compose("config")
    check(cfg)
    cfg.dpo.beta = 0
    with pytest.raises(PolicyPatchError, match=r"dpo\.beta is 0"):
        check(cfg)


def test_a_teacher_of_ones_own_may_mean_something_else_by_a_filter():
    cfg = hydra.compose("config", ["teacher._target_=mine.Teacher", "+teacher.filter.most=1"])
    check(cfg)


def test_folder_names_of_a_sweep_hold_what_varies_and_no_paths():
    arguments = ["patch.length=2,3", "seed=4", "name=x", "model.path=/a/b", "+judge@risk.judges.bert=hf"]
    assert left_out_of_names(arguments) == ["name", "logger", "model.path"]


def test_an_experiment_is_in_no_folders_name_unless_it_is_swept():
    assert left_out_of_names(["+experiment=length", "seed=4"]) == ["name", "logger", "experiment"]
    assert left_out_of_names(["+experiment=length,beta"]) == ["name", "logger"]


def test_several_risks_are_spelt_out():
    given = ["-m", "risk=[toxicity,harmfulness]", "seed=0,1", "patch.length=[2]"]
    assert spelt_out(given) == [
        "-m",
        "risk=joint",
        "part@risk.parts=[toxicity,harmfulness]",
        "seed=0,1",
        "patch.length=[2]",
    ]
    check_overrides(spelt_out(["risk=[toxicity,harmfulness]"]))
    cfg = hydra.compose(
        "config", spelt_out(["risk=[toxicity,harmfulness]", "teacher@risk.parts.toxicity.teacher=neutral"])
    )
    check(cfg)
    assert list(cfg.risk.parts) == ["toxicity", "harmfulness"]
    assert cfg.risk.parts.toxicity.teacher.judges == ["bilstm"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["risk=joint", "teacher=dataset"], "teacher@risk.parts.NAME.teacher"),
        (["teacher=of_parts"], "teacher=of_parts is risk=joint's"),
        (["risk=joint", "part@risk.parts=[]"], "risk names no risk"),
        (["risk=joint", "+risk.parts.mine.risk.name=x"], "risk.parts.mine needs a risk and a teacher"),
        (
            ["risk=joint", "+risk.parts.toxicity.teacher.filter.margins=0.1"],
            "risk.parts.toxicity.teacher.filter.margins",
        ),
    ],
)
def test_what_is_no_joint_risk_is_told(arguments: list[str], told: str):
    with pytest.raises(PolicyPatchError, match=re.escape(told)):
        check(hydra.compose("config", arguments))


def test_long_command_lines_keep_names_short():
    fixed = [f"{stage}.{key}=3" for stage in ("sft", "dpo") for key in ("steps", "batch_size", "lr", "clip", "warmup")]
    assert left_out_of_names(["patch.length=2,3", *fixed])[2:] == [line.split("=")[0] for line in fixed]


@pytest.mark.parametrize(
    ("arguments", "nameless"),
    [
        (["name=x", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], True),
        (["model.path=/a/b"], True),
        (["hydra.sweep.subdir=mine"], False),
        (["seed=1"], False),
        (["+experiment=lora", "+arm=patch"], False),
        (["+experiment=lora"], False),
        (
            [
                "+experiment=lora",
                "+arm=patch",
                "seed=1",
                *(f"{stage}.{key}=0.123456789" for stage in ("sft", "dpo") for key in ("lr", "clip", "warmup")),
            ],
            True,
        ),
    ],
)
def test_a_job_that_nothing_tells_apart_gets_a_folder_below_the_sweeps(arguments: list[str], nameless: bool):
    assert has_no_name(arguments, left_out_of_names(arguments)) == nameless


def test_a_secret_of_the_environment_is_no_value(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijkl")
    monkeypatch.setenv("SHORT_KEY", "text")  # no key, and a value of init.kind
    check_overrides(["init=text"])
    for override in ("prompt.text='with ${oc.env:HF_TOKEN}'", "judge_model.name=hf_abcdefghijkl"):
        told = refusal(override)
        assert "holds what the environment variable HF_TOKEN keeps" in told and "abcdefghijkl" not in told
