"""The packing, by hand: what stands where, and who sees whom."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policypatch.model import tree as module
from policypatch.model.tree import Cost, Item, build_tree, common_prefix

# Common prefix (7,). Item 0 adds a prompt of 2 and completions of 2 and 1 token, item 1 a prompt of 1 and 1 token.
ITEMS = [Item((7, 1, 2), ((3, 4), (5,))), Item((7, 9), ((6,),))]


@pytest.mark.parametrize(
    ("prompts", "length"),
    [
        ([], 0),
        ([[1, 2, 3]], 3),
        ([[1, 2, 3], [1, 2, 4], [1, 2]], 2),
        ([[1, 2], [1, 2]], 2),
        ([[1, 2], [3, 2]], 0),
        ([[], [1]], 0),
        ([[9, 1], [10, 1]], 0),  # as numbers, not as text
    ],
)
def test_common_prefix(prompts, length):
    assert common_prefix(prompts) == length


@given(st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=1, max_size=5))
def test_common_prefix_is_shared_and_cannot_be_longer(prompts):
    n = common_prefix(prompts)
    assert len({tuple(p[:n]) for p in prompts}) == 1
    assert any(len(p) == n for p in prompts) or len({p[n] for p in prompts}) > 1


def test_one_row_by_hand():
    tree = build_tree(ITEMS)
    assert tree.root.tolist() == [7]
    # prompt 1 2 | chosen 3 4 | rejected 5 | prompt 9 | completion 6
    assert tree.ids.tolist() == [[1, 2, 3, 4, 5, 9, 6]]
    # Both completions of item 0 continue at offset 2; item 1 starts again at 0.
    assert tree.offsets.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    sees = [
        [1, 0, 0, 0, 0, 0, 0],  # 1
        [1, 1, 0, 0, 0, 0, 0],  # 2
        [1, 1, 1, 0, 0, 0, 0],  # 3: the prompt and itself
        [1, 1, 1, 1, 0, 0, 0],  # 4
        [1, 1, 0, 0, 1, 0, 0],  # 5: the prompt and itself, not its sibling 3 4
        [0, 0, 0, 0, 0, 1, 0],  # 9: nothing of item 0
        [0, 0, 0, 0, 0, 1, 1],  # 6
    ]
    assert tree.allowed.int().tolist() == [sees]
    assert tree.targets.tolist() == [3, 4, 5, 6]
    assert tree.sequence.tolist() == [0, 0, 1, 2]
    assert tree.sequences == 3
    assert tree.source_row.tolist() == [0, 0, 0, 0]
    # 3 and 5 are predicted where the prompt ends (column 1), 4 by 3 (column 2), 6 by 9 (column 5).
    assert tree.source_col.tolist() == [1, 2, 1, 5]
    assert (tree.tokens, tree.padding) == (1 + 7, 0)


def test_two_rows_by_hand():
    tree = build_tree(ITEMS, max_row_tokens=5)  # item 0 has 5 tokens behind the root, item 1 has 2
    assert tree.ids.tolist() == [[1, 2, 3, 4, 5], [9, 6, 0, 0, 0]]
    assert tree.offsets.tolist() == [[0, 1, 2, 3, 2], [0, 1, 0, 0, 0]]
    padding = [[0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]  # sees itself alone
    assert tree.allowed[1].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], *padding]
    assert tree.targets.tolist() == [3, 4, 5, 6]
    assert tree.source_row.tolist() == [0, 0, 0, 1]
    assert tree.source_col.tolist() == [1, 2, 1, 0]
    assert (tree.tokens, tree.padding) == (1 + 10, 3)


def test_prompt_that_is_all_root_points_at_the_roots_last_state():
    tree = build_tree([Item((7, 8), ((1, 2), (3,)))])
    assert tree.root.tolist() == [7, 8]
    assert tree.ids.tolist() == [[1, 2, 3]]
    assert tree.source_col.tolist() == [-1, 0, -1]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=9),
    st.integers(1, 40),
    st.sampled_from([None, Cost(4), Cost(64, 5)]),
)
def test_rows_hold_every_item_once_within_the_limit(lengths, limit, cost):
    # Different first tokens, so nothing is shared and the sizes are what stands here.
    items = [Item((i + 1,) * p, ((100 + i,) * c,)) for i, (p, c) in enumerate(lengths)]
    tree = build_tree(items, limit, cost)
    shared = lengths[0][0] if len(items) == 1 else 0
    sizes = [p - shared + c for p, c in lengths]
    assert tree.ids.shape[1] <= max(limit, *sizes)
    assert sorted(tree.ids[tree.ids > 0].tolist()) == sorted(
        t for i in items for t in (*i.prompt[shared:], *i.completions[0])
    )
    assert tree.targets.tolist() == [t for i in items for t in i.completions[0]]


def test_one_long_item_does_not_give_every_other_a_row_of_its_own():
    items = [Item((1,), ((2,) * 20,))] + [Item((3, i), ((4,),)) for i in range(10)]  # 21 and 10 x 3 tokens
    assert build_tree(items, 8).ids.shape == (3, 21)  # 51 tokens in rows of 21


def test_cost_by_hand():
    cost = Cost(width=10, front=4)  # 30 keys cost what a token does
    assert cost(6, 1, 20) == 10 * (1 + 10 / 30) + 20 * (1 + 30 / 30)
    assert cost(6, 3, 20) == 10 * (1 + 10 / 30) + 60 * (1 + 30 / 30)
    apart = Cost(width=10, front=4, shared=False, split=7)
    assert apart(6, 1, 20) == cost(6, 1, 20)
    assert apart(6, 3, 20) == 7 + 30 * (1 + 10 / 30) + 60 * (1 + 30 / 30)


def test_rows_are_as_many_as_cost_least():
    items = [Item((i,), ((100,) * 49,)) for i in range(8)]  # eight rows of 50 tokens, or one of 400, or in between
    costs = {rows: Cost(8)(0, rows, 400 // rows) for rows in (1, 2, 4, 8)}
    assert min(costs, key=costs.__getitem__) == 8  # attention costs most at this width
    assert build_tree(items, 512, Cost(8)).ids.shape == (8, 50)
    assert build_tree(items, 512, Cost(10_000, split=64)).ids.shape == (1, 400)  # and next to nothing at that one
    assert build_tree(items, 100).ids.shape == (4, 100)  # nobody asked what it costs: the fewest within the limit
    uneven = [Item((i,), ((100,) * (9 if i else 99),)) for i in range(4)]  # 100 tokens and 3 x 10
    assert build_tree(uneven, 512, Cost(64)).ids.shape == (1, 130)  # another row would be padding


def test_a_large_batch_tries_few_packings(monkeypatch):
    """What is done for every batch must not grow with its square."""
    tried, fill = [], module._fill_rows
    monkeypatch.setattr(module, "_fill_rows", lambda *given: tried.append(given[2]) or fill(*given))
    items = [Item((i,), ((100,) * (1 + i % 7),)) for i in range(400)]
    tree = build_tree(items, 256, Cost(64))
    assert len(tried) <= module.TRIED + 1 and tried[-1] == 400
    assert tree.sequences == 400 and tree.ids.shape[1] <= 256


@pytest.mark.parametrize(
    ("items", "message"), [([], "at least one"), ([Item((1,), ((2,), ()))], "completion has no tokens")]
)
def test_refuses(items, message):
    with pytest.raises(ValueError, match=message):
        build_tree(items)


def test_to_moves_every_tensor():
    tree = build_tree(ITEMS).to(torch.device("meta"))
    assert {v.device.type for v in vars(tree).values() if isinstance(v, torch.Tensor)} == {"meta"}
    assert tree.sequences == 3
