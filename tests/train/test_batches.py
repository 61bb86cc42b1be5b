"""What a batch of mixed rows points at, worked out by hand."""

import pytest
import torch

from policypatch.data.datamodule import Example, PairData
from policypatch.model.tree import Item, build_tree

CHOSEN, REJECTED = (5, 6), (7,)


def row(number: int, rejected: bool = True, benign: bool = False) -> Example:
    completions = ((100 + number, *CHOSEN), (200 + number, *REJECTED))
    return Example(Item((9, number), completions[: 2 if rejected else 1]), "benign" if benign else "pair")


# 0: benign, refused by the teacher. 1, 3: benign, without a rejected side. 2, 4: pairs of the risk.
ROWS = [row(0, benign=True), row(1, False, True), row(2), row(3, False, True), row(4)]


def data(completions: int = 2, **options) -> PairData:
    return PairData(ROWS, 4, 1, 0, completions, lambda items: build_tree(items, 64), **options)


def completion(batch, sequence: int) -> tuple[int, ...]:
    """The tokens of a completion of the batch's tree, told by its number."""
    return tuple(batch.tree.targets[batch.tree.sequence == sequence].tolist())


def test_indices_of_a_mixed_batch():
    """Rows 2, 1, 0, 3 have 2, 1, 2, 1 completions: 0 1 | 2 | 3 4 | 5."""
    batch = data().batch([2, 1, 0, 3])
    assert batch.pairs == (2, 1, 0, 3)
    assert batch.tree.sequences == 6
    assert batch.chosen.tolist() == [0, 2, 3, 5]
    assert batch.rejected.tolist() == [1, -1, 4, -1]
    assert [completion(batch, s)[0] for s in batch.chosen.tolist()] == [102, 101, 100, 103]
    assert [completion(batch, s)[0] for s in (1, 4)] == [202, 200]


def test_a_batch_of_pairs_alone_alternates():
    batch = data().batch([4, 2])
    assert (batch.chosen.tolist(), batch.rejected.tolist()) == ([0, 2], [1, 3])


def test_sft_has_no_rejected_side():
    batch = data(completions=1).batch([2, 1, 0, 3])
    assert batch.tree.sequences == 4
    assert batch.chosen.tolist() == [0, 1, 2, 3]
    assert batch.rejected.tolist() == [-1] * 4


@pytest.mark.parametrize(
    ("completions", "anchor", "held", "sequences"),
    [
        (2, "benign", [1, 0, 3], [2, 3, 5]),
        (2, "all", [2, 1, 0, 3], [0, 2, 3, 5]),
        (1, "benign", [1, 0, 3], [1, 2, 3]),
    ],
)
def test_the_anchor_is_the_chosen_side_of_the_rows_it_is_for(completions, anchor, held, sequences):
    batch = data(completions, anchor=anchor).batch([2, 1, 0, 3])
    assert batch.anchor.sequences.tolist() == sequences
    assert batch.anchor.tree.sequences == len(held)
    assert [completion(batch.anchor, s) for s in range(len(held))] == [ROWS[i].item.completions[0] for i in held]


def test_no_anchor_where_none_is_asked_for_or_no_row_is_benign():
    assert data().batch([2, 1, 0, 3]).anchor is None
    assert data(anchor="benign").batch([4, 2]).anchor is None


def test_rows_beside_the_batch_have_trees_of_their_own():
    """0, 1 are pairs, 2 a benign text, 3 and 4 balanced: neither is among the batch's completions."""
    rows = [row(0), row(1), Example(row(2, False).item, "text"), *(Example(row(i).item, "balanced") for i in (3, 4))]
    source = PairData(rows, 2, 3, 0, 1, lambda items: build_tree(items, 64), texts=1, balanced=2, held_out=0.5)
    assert sorted([*source.training, *source.validation]) == [0, 1]
    for batch in source.train_dataloader():
        assert set(batch.pairs) <= {0, 1} and batch.tree.sequences == 2
        assert batch.texts.targets.tolist() == [102, *CHOSEN]
        assert sorted(batch.balanced.targets[batch.balanced.sequence == s][0].item() for s in range(4)) == [
            *(103, 104, 203, 204)
        ]
    (held_out,) = source.val_dataloader()
    assert held_out.texts is None and held_out.balanced is None


def test_no_rows_beside_the_batch_where_there_are_none_or_none_are_asked_for():
    rows = [*ROWS, Example(row(5, False).item, "text")]
    for options in ({"balanced": 2}, {"texts": 0}):
        source = PairData(rows, 4, 1, 0, 2, lambda items: build_tree(items, 64), **options)
        (batch,) = source.train_dataloader()
        assert (batch.texts, batch.balanced) == (None, None)


def test_reference_figures_go_with_their_rows():
    reference = torch.arange(10.0).reshape(5, 2)
    assert data(reference=reference).batch([4, 0]).reference.tolist() == [[8, 9], [0, 1]]


def test_a_batch_moves_with_everything_in_it():
    batch = data(anchor="benign", reference=torch.zeros(5, 2)).batch([2, 1]).to(torch.device("meta"))
    tensors = [batch.chosen, batch.rejected, batch.reference, batch.tree.ids, batch.anchor.sequences]
    assert {t.device.type for t in [*tensors, batch.anchor.tree.targets]} == {"meta"}
