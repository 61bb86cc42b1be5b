"""What is told of sampling: how many tokens were drawn, and how fast."""

import logging
import re

from policypatch.model.completions import complete
from policypatch.model.sampling import Sampling


def test_tokens_a_second_are_told_of_what_was_drawn_and_not_of_what_was_there(tiny_base, caplog):
    sampling = Sampling(max_new_tokens=5, min_new_tokens=5)
    for _ in range(2):
        with caplog.at_level(logging.INFO, "policypatch.model.completions"):
            complete(tiny_base, ["The harbour was", "Nobody in"], None, 3, sampling, 0, 16, "pairs")
    (told,) = re.findall(r"sampling for pairs: (\d+) tokens in \d+ s, (\d+) a second", caplog.text)
    assert int(told[0]) == 2 * 3 * 5 and int(told[1]) > 0
