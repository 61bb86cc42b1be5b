"""Files of a model or data set repository, through huggingface_hub and its own cache.

Of a model's repository nothing is fetched whose format is a pickle, since reading one runs code; safetensors
and GGUF are what is left. Without a network, what was fetched before still works.
"""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from policypatch.errors import PolicyPatchError
from policypatch.files.globs import is_glob, select
from policypatch.progress import ByteLines, terminal

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.msgpack", "*.h5")
TYPES = ("model", "dataset")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def files(repo: str, revision: str, pattern: str | None, kind: str, key: str) -> list[Path]:
    """The selected files, sorted; without a pattern the one folder that holds the repository.

    Raises PolicyPatchError, naming the config key `key`, when they cannot be had or would be a pickle.
    """
    if pattern is not None and kind == "model" and pattern.endswith(tuple(p[1:] for p in PICKLES)):
        raise PolicyPatchError(
            f"{key}: {pattern!r} of {repo} may be a pickle, and those are not read; give a safetensors or GGUF file"
        )
    # Imported here: it takes a third of a second, and most runs need nothing of it.
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HTTPError, RevisionResolutionError

    try:
        if pattern is not None and not is_glob(pattern):
            path = hf_hub_download(repo, pattern, revision=revision, repo_type=kind, tqdm_class=_bar(repo))
            return [Path(str(path))]
        folder = snapshot_download(
            repo,
            revision=revision,
            repo_type=kind,
            allow_patterns=pattern,
            ignore_patterns=list(PICKLES) if kind == "model" else None,
            tqdm_class=_bar(repo),
        )
    except (OSError, ValueError, EntryNotFoundError, RevisionResolutionError, HTTPError) as error:
        what = f"{pattern!r} of {repo}" if pattern else repo
        raise PolicyPatchError(f"{key}: cannot fetch {what} at {revision}: {_explain(error)}") from error
    root = Path(str(folder))
    if pattern is None:
        return [root]
    found = select(pattern, (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()))
    if not found:
        raise PolicyPatchError(f"{key}: {repo} at {revision} holds no file {pattern!r} (pickles are left out)")
    return [root / name for name in found]


def _bar(repo: str) -> Any:
    """What shows a download: huggingface_hub's own bar (None) on a terminal, lines elsewhere."""
    if terminal() is not None:
        return None
    from huggingface_hub.utils import tqdm

    class Lines(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Others count files, or bytes as they go over the wire.
            counts = kwargs.get("unit") == "B" and not str(kwargs.get("name", "")).endswith(".transfer")
            super().__init__(*args, **{**kwargs, "disable": True})
            self.lines = ByteLines(repo, kwargs.get("initial") or 0) if counts else None

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self.lines is not None:
                self.lines.update(self.n, self.total)

    return Lines


def commit(repo: str, revision: str, pattern: str | None, kind: str, key: str) -> str:
    """The commit that a revision means. A branch moves, so it is looked up, which fetches the files."""
    if _COMMIT.fullmatch(revision):
        return revision
    parts = files(repo, revision, pattern, kind, key)[0].parts
    # huggingface_hub keeps them in .../snapshots/<commit>/...
    found = [part for before, part in pairwise(parts) if before == "snapshots"]
    return found[-1] if found else revision


def _explain(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled | ConnectionError):
        return "the hub cannot be reached and no copy is kept here; fetch it once with a network, or give {path: ...}"
    if isinstance(error, errors.GatedRepoError):
        return "access to it is restricted; accept its terms on the hub, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private: check the name, or run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "there is no such revision"
    if isinstance(error, errors.EntryNotFoundError):
        return "there is no such file in it"
    lines = str(error).strip().splitlines()
    return f"{lines[0] if lines else type(error).__name__}; or give {{path: ...}}"
