"""What libraries say about themselves is kept out of a run's log, so that what the run says can be read."""

from __future__ import annotations

import logging
import sys
import warnings

import transformers


def quiet_libraries() -> None:
    """Warnings and errors only from Lightning and transformers; no progress bars where nobody watches."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    # Of every machine that has SLURM, also where a run is not meant for it.
    warnings.filterwarnings("ignore", r"The `srun` command is available on your system but is not used")
    # Lightning's own use of a torch API that is about to change; nothing a user could do.
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\).*")
