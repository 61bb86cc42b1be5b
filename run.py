"""Train, judge, package and report a patch:  python run.py [KEY=VALUE ...]  or a sweep:  python run.py -m KEY=A,B."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

CONF = Path(__file__).parent / "conf"
os.environ.setdefault("POLICYPATCH_HOME", str(CONF.parent.resolve()))  # config.yaml finds experiments/ by it
# conf/hydra/launcher/slurm.yaml asks for GPUs where the trainer works on them.
OmegaConf.register_new_resolver("gpus", lambda kind, devices: devices if kind == "gpu" else None, replace=True)
NAMING = "hydra.job.config.override_dirname.exclude_keys"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(cfg: DictConfig) -> None:
    """One run, or one job of a sweep: compose is done, the rest is policypatch.launch."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from policypatch.errors import ForeignFolder, PolicyPatchError

    hydra_cfg = HydraConfig.get()
    about = cfg, Path(hydra_cfg.runtime.output_dir), hydra_cfg.job.override_dirname, list(hydra_cfg.overrides.task)
    log_config: Any = OmegaConf.to_container(hydra_cfg.job_logging, resolve=True)
    if hydra_cfg.mode == RunMode.MULTIRUN:
        from policypatch.sweep import job

        return job(*about, log_config, hydra_cfg.launcher.get("n_jobs", 1))
    from policypatch.launch import start
    from policypatch.report.records import FAILED
    from policypatch.sweep import note_failure

    try:
        start(*about, log_config)
    except Exception as error:
        if not isinstance(error, ForeignFolder):
            note_failure(about[1] / FAILED, error)
        if not isinstance(error, PolicyPatchError):
            raise
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def prepare() -> None:
    """Tell what is wrong with the command line before Hydra or a model is started, and keep a sweep's names short."""
    from hydra._internal.utils import get_args

    from policypatch.command_line import check_folder, check_overrides, has_no_name, left_out_of_names, spelt_out
    from policypatch.errors import PolicyPatchError

    sys.argv[1:] = spelt_out(sys.argv[1:])
    arguments = get_args()
    if arguments.help or arguments.hydra_help or arguments.cfg or arguments.info or arguments.shell_completion:
        return
    if arguments.config_path or arguments.config_name or arguments.config_dir or arguments.experimental_rerun:
        return  # composed from elsewhere: the job checks what it gets
    try:
        with hydra.initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            check_overrides(arguments.overrides, arguments.multirun)
            check_folder(arguments.overrides, arguments.multirun)
            if arguments.multirun and not any(NAMING in override for override in arguments.overrides):
                left_out = left_out_of_names(arguments.overrides)
                sys.argv.append(f"{NAMING}={left_out}")
                if has_no_name(arguments.overrides, left_out):
                    sys.argv.append("hydra.sweep.subdir=${hydra:job.num}")
    except PolicyPatchError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    logging.raiseExceptions = False  # a full disk is told once, by whoever wants to keep something, not for every line
    prepare()
    try:
        main()
    finally:
        from policypatch.sweep import compare_what_is_left

        compare_what_is_left()
