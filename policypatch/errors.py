"""The one exception that a user is meant to read."""


class PolicyPatchError(Exception):
    """A mistake in what the user gave us, told in one sentence.

    The message names the config key, file or row that is wrong and says what to do about it.
    `run.py` and the `policypatch` command print it without a traceback and exit with status 2.
    """
