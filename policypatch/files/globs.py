"""Shell patterns over names that are not on this disk: the members of a wheel, the files of a repository.

Like a shell's: `*` and `?` stay inside one folder, `**` crosses folders. (`fnmatch` lets `*` cross them.)
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import PurePosixPath

_TOKENS = re.compile(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", re.DOTALL)


def is_glob(pattern: str) -> bool:
    """Whether a pattern may stand for several names."""
    return any(character in pattern for character in "*?[")


def select(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that are the pattern or that it matches, sorted."""
    names = sorted(names)
    if pattern in names:  # a name with a bracket in it is a name first
        return [pattern]
    expression = re.compile("".join(map(_translate, _TOKENS.findall(pattern))), re.DOTALL)
    return [name for name in names if expression.fullmatch(name)]


def _translate(token: str) -> str:
    if token == "**/":
        return "(?:.*/)?"
    if token == "**":
        return ".*"
    if token == "*":
        return "[^/]*"
    if token == "?":
        return "[^/]"
    if len(token) > 2:  # [abc], [!abc]
        negated = token[1] == "!"
        inside = token[2:-1] if negated else token[1:-1]
        inside = inside.replace("\\", r"\\").replace("^", r"\^").replace("[", r"\[").replace("]", r"\]")
        return f"[{'^/' if negated else ''}{inside}]"
    return re.escape(token)


def near(wanted: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The names that a mistyped one probably meant: the same file elsewhere first, then similar spellings."""
    names = sorted(names)
    base = PurePosixPath(wanted).name
    same = [name for name in names if PurePosixPath(name).name == base]
    return list(dict.fromkeys(same + difflib.get_close_matches(wanted, names, n=count, cutoff=0.6)))[:count]
