"""A layer behind a stack is transformers' own to everything but attention, whatever is done to it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from policypatch.errors import PolicyPatchError
from policypatch.model.behind import BehindLayer, adopt, whole_of

HEADS, WIDTH = 2, 4
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.just(1)),
        st.tuples(st.just("update"), st.integers(1, 40)),
        st.tuples(st.just("crop"), st.integers(1, 3)),
        st.tuples(st.just("reorder"), st.permutations(range(3))),
        st.tuples(st.just("copy"), st.just(0)),
        st.tuples(st.just("replace"), st.just(0)),
        st.tuples(st.just("front"), st.integers(0, 5)),
    ),
    max_size=12,
)


class Front:
    """What stands before, which may change."""

    def __init__(self, length: int):
        self.become(length)

    def become(self, length: int) -> None:
        self.front = (*(torch.randn(3, HEADS, length, WIDTH) for _ in range(2)), None) if length else None

    def __call__(self, number: int, batch: int):
        return self.front


@settings(max_examples=150, deadline=None)
@given(steps=STEPS, length=st.integers(0, 5))
def test_whatever_is_done_to_it(steps: list, length: int):
    front = Front(length)
    ours, theirs, behind = BehindLayer(front, 0), DynamicLayer(), False
    for what, how in [("update", 2), *steps, ("update", 1)]:
        if what == "update":
            new = [torch.randn(3, HEADS, how, WIDTH) for _ in range(2)]
            if behind and front.front is None:
                with pytest.raises(PolicyPatchError, match="removed since: start a new cache"):
                    ours.update(*new)
                front.become(3)
            keys, values = ours.update(*new)
            theirs.update(*new)
            behind = front.front is not None
            whole = whole_of(keys, values)
            assert (whole is None) == (front.front is None)
            if whole is not None:
                for found, before, own in zip(whole, front.front[:2], (theirs.keys, theirs.values), strict=True):
                    assert torch.equal(found, torch.cat([before, own], 2))
        elif what == "crop" and how < theirs.get_seq_length():
            ours.crop(-how), theirs.crop(-how)
        elif what == "reorder":
            for layer in (ours, theirs):
                layer.reorder_cache(torch.tensor(how))
        elif what == "copy":
            ours, behind = BehindLayer(front, 0, copy.deepcopy(ours)), True
        elif what == "replace":
            ours.keys = ours.keys.clone()
        elif what == "front":
            front.become(how)
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_a_token_is_written_in_place():
    layer = BehindLayer(Front(3), 0)
    layer.update(*(torch.randn(3, HEADS, 5, WIDTH) for _ in range(2)))
    places = set()
    for _ in range(60):
        keys, values = layer.update(*(torch.randn(3, HEADS, 1, WIDTH) for _ in range(2)))
        places.add(whole_of(keys, values)[0].data_ptr())
    assert len(places) == 1


def test_what_it_gave_out_is_not_written_over():
    layer = BehindLayer(Front(3), 0)
    keys, _ = layer.update(*(torch.randn(3, HEADS, 5, WIDTH) for _ in range(2)))
    before = keys.clone()
    layer.update(*(torch.randn(3, HEADS, 90, WIDTH) for _ in range(2)))
    assert torch.equal(keys, before)


def test_a_copy_is_a_plain_one_that_goes_its_own_way():
    layer = BehindLayer(Front(3), 0)
    layer.update(*(torch.randn(3, HEADS, 5, WIDTH) for _ in range(2)))
    remake, parts = layer.__reduce__()  # what a file of it would have
    for other in (copy.deepcopy(layer), remake(*parts)):
        assert type(other) is DynamicLayer
        other.update(*(torch.zeros(3, HEADS, 1, WIDTH) for _ in range(2)))
        assert torch.equal(other.keys[:, :, :5], layer.keys) and layer.get_seq_length() == 5
    assert not copy.deepcopy(BehindLayer(Front(3), 0)).is_initialized


@pytest.mark.parametrize("learning", [(True, True), (True, False), (False, True)])
def test_with_a_gradient_nothing_is_written_in_place(learning: tuple[bool, bool]):
    """Of keys or of values alone, too (LoRA of some layers): a token after a token without one."""
    layer = BehindLayer(Front(3), 0)
    layer.update(*(torch.randn(3, HEADS, 1, WIDTH) for _ in range(2)))
    states = [torch.randn(3, HEADS, 1, WIDTH, requires_grad=learns) for learns in learning]
    keys, values = layer.update(*states)
    assert whole_of(keys, values) is None
    (keys + values).sum().backward()
    assert all(torch.equal(of.grad, torch.ones_like(of)) for of in states if of.requires_grad)


def test_what_was_begun_in_inference_mode_goes_on_outside_of_it():
    layer = BehindLayer(Front(3), 0)
    with torch.inference_mode():
        layer.update(*(torch.randn(3, HEADS, 2, WIDTH) for _ in range(2)))
    keys, values = layer.update(*(torch.ones(3, HEADS, 1, WIDTH) for _ in range(2)))
    assert whole_of(keys, values)[0].shape[2] == 6 and keys[:, :, 2].eq(1).all()


def test_only_caches_that_grow_by_concatenation_are_adopted(tiny_llama):
    cache = DynamicCache()
    adopt(cache, Front(2), 3)
    assert [type(layer) for layer in cache.layers] == [BehindLayer] * 3
    static = StaticCache(config=tiny_llama.config, max_cache_len=8)
    kinds = [type(layer) for layer in static.layers]
    adopt(static, Front(2), 3)
    assert [type(layer) for layer in static.layers] == kinds
    adopt(None, Front(2), 3)


def test_a_cache_that_was_filled_before_is_taken_over():
    cache = DynamicCache()
    cache.update(*(torch.randn(3, HEADS, 5, WIDTH) for _ in range(2)), 0)
    old = cache.layers[0].keys
    adopt(cache, Front(2), 3)
    assert len(cache.layers) == 1 and torch.equal(cache.layers[0].keys, old)


@pytest.mark.parametrize("length", [0, 3])
def test_reset_empties_it(length: int):
    layer = BehindLayer(Front(length), 0)
    layer.update(*(torch.randn(3, HEADS, 5, WIDTH) for _ in range(2)))
    layer.reset()
    assert layer.get_seq_length() == 0
    keys, _ = layer.update(*(torch.ones(3, HEADS, 2, WIDTH) for _ in range(2)))
    assert torch.equal(keys, torch.ones(3, HEADS, 2, WIDTH))
