"""A patch in company: the forward is that of the concatenation, and what is drawn is fair and repeats."""

from collections import Counter

import pytest
import torch

from policypatch.model.backbone import PrefixBackbone, plain_logits
from policypatch.model.company import CompanyBackbone, drawn
from policypatch.model.tree import Item

ITEMS = [Item((5, 6, 7), ((8, 9), (10, 11, 12))), Item((5, 13), ((14, 15), (16,)))]


@pytest.fixture
def parts() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(5)
    return [torch.randn(n, 64, generator=random) * 0.08 for n in (4, 2, 3)]  # the patch, two companions


def company(model, parts, dropout: float = 0.5) -> CompanyBackbone:
    return CompanyBackbone(model, parts[0], 512, parts[1:], dropout, seed=3)


def test_in_company_it_is_the_concatenation(tiny_llama, parts):
    backbone = company(tiny_llama, parts, 0.0)
    places = set()
    for step in range(12):
        backbone.begin(step)
        before, behind = drawn(2, 0.0, 3, step)
        places.add((tuple(before), tuple(behind)))
        whole = torch.cat([*(parts[1 + i] for i in before), parts[0], *(parts[1 + i] for i in behind)])
        plain = torch.cat([plain_logits(tiny_llama, whole, [*i.prompt], [*c]) for i in ITEMS for c in i.completions])
        torch.testing.assert_close(backbone.logits(backbone.tree(ITEMS)), plain, rtol=1e-4, atol=1e-4)
    assert len(places) > 3


def test_outside_of_training_it_is_alone(tiny_llama, parts):
    backbone, alone = company(tiny_llama, parts, 0.0), PrefixBackbone(tiny_llama, parts[0])
    tree = alone.tree(ITEMS)
    for begin in (lambda: None, lambda: backbone.begin(0), lambda: backbone.begin(None)):
        begin()
        same = torch.equal(backbone.hidden(tree), alone.hidden(tree))
        assert same == (not backbone._before and not backbone._behind)
    assert same


def test_the_anchor_is_the_base_behind_the_companions(tiny_llama, parts):
    """What a patch should leave alone is what its companions do without it."""
    backbone = company(tiny_llama, parts, 0.0)
    backbone.begin(0)
    before, behind = drawn(2, 0.0, 3, 0)
    others = torch.cat([parts[1 + i] for i in (*before, *behind)])
    alone = PrefixBackbone(tiny_llama, others)
    tree = backbone.tree(ITEMS)
    torch.testing.assert_close(backbone.base_hidden(tree), alone.hidden(tree), rtol=1e-4, atol=1e-4)


def test_the_reference_stands_in_the_same_company(tiny_llama, parts):
    backbone, reference = company(tiny_llama, parts, 0.0), parts[0] * 0.5
    tree = backbone.tree(ITEMS)
    backbone.begin(0)
    assert backbone.reference_logprobs(tree) is None  # what it is was not said
    backbone.reference = reference
    before, behind = drawn(2, 0.0, 3, 0)
    whole = torch.cat([*(parts[1 + i] for i in before), reference, *(parts[1 + i] for i in behind)])
    expected = PrefixBackbone(tiny_llama, whole).sequence_logprobs(tree)
    torch.testing.assert_close(backbone.reference_logprobs(tree), expected, rtol=1e-4, atol=1e-4)
    backbone.begin(None)
    assert backbone.reference_logprobs(tree) is None  # alone it is what the batch says


def test_only_the_patch_learns_and_only_it_is_kept(tiny_llama, parts):
    backbone = company(tiny_llama, parts, 0.0)
    backbone.begin(0)
    backbone.sequence_logprobs(backbone.tree(ITEMS)).sum().backward()
    assert [name for name, _ in backbone.named_parameters()] == list(backbone.state_dict()) == ["patch"]
    assert backbone.patch.grad is not None and backbone.patch.grad.abs().sum() > 0


def test_what_is_drawn_repeats_and_is_as_frequent_as_it_should_be():
    """Of two companions each is there in half of the steps, and the patch stands at every place of equally many."""
    draws = [drawn(2, 0.5, 0, step) for step in range(4000)]
    assert draws == [drawn(2, 0.5, 0, step) for step in range(4000)]
    assert draws != [drawn(2, 0.5, 1, step) for step in range(4000)]
    for companion in (0, 1):
        share = sum(companion in (*before, *behind) for before, behind in draws) / len(draws)
        assert share == pytest.approx(0.5, abs=0.03)
    places = Counter((len(before), len(behind)) for before, behind in draws)
    assert places[0, 0] / len(draws) == pytest.approx(0.25, abs=0.03)
    for pair in ((0, 2), (1, 1), (2, 0)):
        assert places[pair] / len(draws) == pytest.approx(0.25 / 3, abs=0.03)
    orders = Counter((*before, *behind) for before, behind in draws if len(before) + len(behind) == 2)
    assert orders[0, 1] / orders.total() == pytest.approx(0.5, abs=0.06)


def test_all_left_out_is_no_company():
    assert all(drawn(3, 1.0, 0, step) == ([], []) for step in range(50))
    assert all(sum(map(len, drawn(3, 0.0, 0, step))) == 3 for step in range(50))
