"""Arrays in the cache; of one made batch by batch, what was finished before a kill is not made again."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from policypatch.files.arrays import array, rows_array
from policypatch.files.cache import begun_of, cache_root, content_key, counters, reset_counters

ABOUT = {"of": "tests"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POLICYPATCH_CACHE", str(tmp_path))
    reset_counters()


class Maker:
    """Rows (number, square) with a NaN in the first; dies before the batch of this number."""

    def __init__(self, dies_at: int | None = None, dtype: type = np.float32) -> None:
        self.made: list[range] = []
        self.ready, self.dies_at, self.dtype = 0, dies_at, dtype

    def __call__(self, batches: Sequence[range]) -> Iterator[np.ndarray]:
        self.ready += 1
        for rows in batches:
            if len(self.made) == self.dies_at:
                raise KeyboardInterrupt
            self.made.append(rows)
            yield np.array([[np.nan if i == 0 else i / 3, i * i] for i in rows], self.dtype).reshape(-1, 2)


def get(maker: Maker, rows: int = 10) -> np.ndarray:
    return rows_array("numbers", ABOUT | {"rows": rows}, rows, maker, "numbers", at_once=4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dies_at", [0, 1, 2])
def test_a_kill_costs_no_batch_that_was_finished(dies_at: int, dtype: type, tmp_path):
    killed, again = Maker(dies_at, dtype), Maker(dtype=dtype)
    with pytest.raises(KeyboardInterrupt):
        get(killed)
    found = get(again)
    assert [*killed.made, *again.made] == [range(0, 4), range(4, 8), range(8, 10)]
    expected = np.array([[np.nan if i == 0 else i / 3, i * i] for i in range(10)], dtype)
    assert found.dtype == dtype and np.array_equal(found, expected, equal_nan=True)
    assert begun_of(cache_root() / "numbers" / content_key(**ABOUT, rows=10)) == []


def test_one_that_is_there_is_not_made():
    first, second = Maker(), Maker()
    assert np.array_equal(get(first), get(second), equal_nan=True)
    assert second.ready == 0


def test_one_whose_last_batch_was_finished_needs_no_getting_ready(monkeypatch):
    from policypatch.files import arrays

    def full(*_):
        raise OSError("no space")

    with monkeypatch.context() as patched:
        patched.setattr(arrays.np, "save", full)
        with pytest.raises(OSError, match="no space"):
            get(Maker())
    again = Maker()
    assert get(again).shape == (10, 2) and again.ready == 0


def test_a_journal_that_a_kill_left_beside_its_entry_goes_with_the_next_use():
    get(Maker())
    folder = cache_root() / "numbers" / content_key(**ABOUT, rows=10)
    left = folder.with_name(f".begun-{folder.name}-0-10")
    left.write_text("")
    get(Maker())
    assert not left.exists() and folder.is_dir()


def test_no_rows():
    assert get(Maker(), rows=0).shape == (0, 2)


def test_an_array_is_made_once_for_everything_it_depends_on() -> None:
    made = []

    def make() -> np.ndarray:
        made.append(1)
        return np.array([[1.5, np.nan], [len(made), np.inf]])

    first, again = array("words", {"a": [1, 2]}, make), array("words", {"a": (1, 2)}, make)
    np.testing.assert_array_equal(first, [[1.5, np.nan], [1, np.inf]])
    np.testing.assert_array_equal(first, again)
    assert first.dtype == again.dtype == np.float64
    assert len(made) == 1
    assert array("words", {"a": [2, 1]}, make)[1, 0] == 2
    assert counters() == {"words": {"hits": 1, "misses": 2}}


def test_an_array_whose_making_fails_is_made_by_the_next() -> None:
    with pytest.raises(ZeroDivisionError):
        array("words", {"a": 1}, lambda: np.array([1 / 0]))
    assert array("words", {"a": 1}, lambda: np.array([7])).tolist() == [7]


def test_an_array_of_objects_is_never_unpickled() -> None:
    with pytest.raises(ValueError, match="allow_pickle"):
        array("words", {"a": 1}, lambda: np.array([{}], dtype=object))
