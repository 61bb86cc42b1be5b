"""What must not change a number: how a batch is cut, packed and ordered; and what training must not touch."""

import pytest
import torch

from policypatch.errors import PolicyPatchError
from policypatch.model.backbone import PrefixBackbone, plain_logits, sum_by_sequence
from policypatch.model.tree import Item

ITEMS = [
    Item((5, 6, 7, 20 + i, 40)[: 3 + i % 3], (tuple(range(100 + i, 104 + i + i % 2)), (200 + i, 17))) for i in range(8)
]


@pytest.fixture
def vectors() -> torch.Tensor:
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(3)) * 0.08


@pytest.fixture
def backbone(tiny_llama, vectors) -> PrefixBackbone:
    return PrefixBackbone(tiny_llama, vectors)


def loss_and_gradient(backbone: PrefixBackbone, items: list[Item]) -> tuple[torch.Tensor, torch.Tensor]:
    tree = backbone.tree(items)
    lengths = torch.bincount(tree.sequence)
    loss = -(backbone.sequence_logprobs(tree) / lengths).mean()
    return loss.detach(), torch.autograd.grad(loss, backbone.patch)[0]


def test_two_batches_of_four_are_one_of_eight(backbone):
    whole = loss_and_gradient(backbone, ITEMS)
    halves = [loss_and_gradient(backbone, ITEMS[:4]), loss_and_gradient(backbone, ITEMS[4:])]
    for both, one in zip(zip(*halves, strict=True), whole, strict=True):
        torch.testing.assert_close(sum(both) / 2, one, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("row_tokens", [16, 20, 40, 10_000])
def test_row_tokens_change_nothing(tiny_llama, vectors, backbone, row_tokens):
    other = loss_and_gradient(PrefixBackbone(tiny_llama, vectors, row_tokens), ITEMS)
    torch.testing.assert_close(other, loss_and_gradient(backbone, ITEMS), rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_order_of_items_changes_nothing(backbone):
    expected = backbone.sequence_logprobs(backbone.tree(ITEMS)).reshape(-1, 2)
    order = [3, 0, 7, 5, 1, 6, 2, 4]
    shuffled = backbone.sequence_logprobs(backbone.tree([ITEMS[i] for i in order])).reshape(-1, 2)
    torch.testing.assert_close(shuffled, expected[order], rtol=1e-5, atol=1e-5)


def logprobs_and_kl(backbone: PrefixBackbone, items: list[Item]) -> tuple[torch.Tensor, torch.Tensor]:
    """With every completion anchored."""
    tree = backbone.tree(items)
    return backbone.completion_logprobs_and_kl(tree, tree, torch.arange(tree.sequences))


def base_logprobs(model, item: Item, completion: tuple[int, ...]) -> torch.Tensor:
    """(len, V) the base alone, from token ids as anyone would call it."""
    logits = model(torch.tensor([[*item.prompt, *completion]])).logits[0]
    return logits[len(item.prompt) - 1 : -1].log_softmax(-1)


@torch.no_grad()
@pytest.mark.parametrize(
    "items",
    [ITEMS, [Item((50, 51), ((8, 9),)), Item((60, 6, 13), ((14, 15), (16,)))]],
    ids=["common", "nothing common"],
)
@pytest.mark.parametrize("row_tokens", [10, 512])
def test_no_vectors_are_the_base(tiny_llama, items, row_tokens):
    backbone = PrefixBackbone(tiny_llama, torch.zeros(0, 64), row_tokens)
    expected = [
        base_logprobs(tiny_llama, i, c).gather(1, torch.tensor(c)[:, None])[:, 0] for i in items for c in i.completions
    ]
    torch.testing.assert_close(
        backbone.completion_logprobs(backbone.tree(items)), torch.cat(expected), rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_kl_of_the_base_to_itself_is_zero(tiny_llama):
    backbone = PrefixBackbone(tiny_llama, torch.zeros(0, 64))
    _, kl = logprobs_and_kl(backbone, ITEMS)
    assert kl.abs().max() == 0


def kl_by_hand(model, vectors: torch.Tensor, item: Item, completion: tuple[int, ...]) -> torch.Tensor:
    """Mean over the tokens of KL(base || patched) = sum_v base(v) (log base(v) - log patched(v)), the base first."""
    base = base_logprobs(model, item, completion)
    ours = plain_logits(model, vectors, [*item.prompt], [*completion]).log_softmax(-1)
    return torch.nn.functional.kl_div(ours, base, log_target=True, reduction="none").sum(-1).mean()


@torch.no_grad()
def test_kl_by_hand(tiny_llama, vectors, backbone):
    logprobs, kl = logprobs_and_kl(backbone, ITEMS)
    torch.testing.assert_close(logprobs, backbone.completion_logprobs(backbone.tree(ITEMS)), rtol=1e-5, atol=1e-6)
    expected = [kl_by_hand(tiny_llama, vectors, item, c) for item in ITEMS for c in item.completions]
    assert kl.min() > 0
    torch.testing.assert_close(kl, torch.stack(expected), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(backbone.divergence(backbone.tree(ITEMS)), kl)


@torch.no_grad()
@pytest.mark.parametrize("row_tokens", [16, 512])
@pytest.mark.parametrize("rows", [[1], [2, 3, 7]])
def test_kl_of_some_completions_is_theirs_among_all(tiny_llama, vectors, rows: list[int], row_tokens: int):
    """The base reads those rows alone, the patched base all of them; the first completion of each is anchored."""
    backbone = PrefixBackbone(tiny_llama, vectors, row_tokens)
    alone = backbone.tree([Item(ITEMS[i].prompt, ITEMS[i].completions[:1]) for i in rows])
    anchored = torch.tensor([2 * i for i in rows])
    logprobs, kl = backbone.completion_logprobs_and_kl(backbone.tree(ITEMS), alone, anchored)
    every_logprobs, every_kl = logprobs_and_kl(backbone, ITEMS)
    torch.testing.assert_close(logprobs, every_logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kl, every_kl[anchored], rtol=1e-4, atol=1e-5)


def test_kl_has_the_gradient_of_the_patch_alone(backbone):
    _, kl = logprobs_and_kl(backbone, ITEMS)
    kl.mean().backward()
    assert backbone.patch.grad.norm() > 0
    assert all(p.grad is None for p in backbone.model.parameters())


def test_sum_by_sequence(backbone):
    tree = backbone.tree([Item((1, 2), ((3, 4), (5,))), Item((1, 6), ((7, 8, 9),))])
    summed = sum_by_sequence(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]), tree)
    assert summed.tolist() == [3.0, 4.0, 56.0]  # 1 + 2; 4; 8 + 16 + 32


def test_training_moves_the_patch_and_nothing_else(tiny_llama, vectors, backbone):
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    optimiser = torch.optim.AdamW(backbone.parameters(), lr=0.01, weight_decay=0.1)
    losses = []
    for _ in range(5):
        backbone.train()
        tree = backbone.tree(ITEMS)
        loss = -backbone.completion_logprobs(tree).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(backbone.patch, vectors)
    after = tiny_llama.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(p.grad is None and not p.requires_grad for p in tiny_llama.parameters())
    assert not tiny_llama.training  # dropout of the frozen model stays off


def test_only_the_patch_is_state(tiny_llama, vectors, backbone):
    assert list(backbone.state_dict()) == ["patch"]
    assert [name for name, _ in backbone.named_parameters()] == ["patch"]
    other = PrefixBackbone(tiny_llama, torch.zeros(4, 64))
    other.load_state_dict(backbone.state_dict())
    assert torch.equal(other.patch, vectors)


def test_patch_is_float32_and_a_copy(tiny_llama, vectors):
    backbone = PrefixBackbone(tiny_llama, vectors.bfloat16())
    assert backbone.patch.dtype == torch.float32
    kept = PrefixBackbone(tiny_llama, vectors)
    with torch.no_grad():
        kept.patch.zero_()
    assert vectors.abs().sum() > 0


@torch.no_grad()
def test_bfloat16_base_takes_float32_vectors(tiny_llama, vectors):
    exact = PrefixBackbone(tiny_llama, vectors)
    tree = exact.tree(ITEMS)
    expected = exact.completion_logprobs(tree)
    rounded = PrefixBackbone(tiny_llama.to(torch.bfloat16), vectors, 16)
    got = rounded.completion_logprobs(rounded.tree(ITEMS))
    assert got.dtype == torch.float32
    assert (got - expected).abs().mean() < 0.1


@torch.no_grad()
def test_empty_prompt_behind_a_patch(tiny_llama, vectors):
    items = [Item((), ((8, 9),)), Item((5, 6), ((7,), (8, 9)))]
    for row_tokens in (512, 4):
        backbone = PrefixBackbone(tiny_llama, vectors, row_tokens)
        expected = torch.cat(
            [plain_logits(tiny_llama, vectors, [*i.prompt], [*c]) for i in items for c in i.completions]
        )
        torch.testing.assert_close(backbone.logits(backbone.tree(items)), expected, rtol=1e-4, atol=1e-4)


def test_empty_prompt_behind_nothing_is_refused(tiny_llama, vectors):
    items = [Item((), ((8, 9),)), Item((5, 6), ((7,),))]
    backbone = PrefixBackbone(tiny_llama, torch.zeros(0, 64))
    with pytest.raises(PolicyPatchError, match="no tokens and no patch"):
        backbone.completion_logprobs(backbone.tree(items))
    patched = PrefixBackbone(tiny_llama, vectors)  # here it is the base that has nothing to predict from
    with pytest.raises(PolicyPatchError, match="no tokens and no patch"):
        logprobs_and_kl(patched, items)


@pytest.mark.parametrize("shape", [(4, 63), (64,), (1, 4, 64)])
def test_refuses_another_width(tiny_llama, shape):
    with pytest.raises(PolicyPatchError, match="vectors of width 64"):
        PrefixBackbone(tiny_llama, torch.zeros(shape))


@pytest.mark.parametrize("row_tokens", [16, 512])
def test_what_is_computed_again_is_the_same_and_not_kept(tiny_llama, vectors, row_tokens):
    """Loss and gradient bit by bit, through a loop of views and copies, while most of what a layer makes is let go."""

    def kept_and_computed(recompute: bool) -> tuple[int, tuple[torch.Tensor, torch.Tensor]]:
        backbone, sizes = PrefixBackbone(tiny_llama, vectors, row_tokens), []
        backbone.recompute = recompute
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            found = loss_and_gradient(backbone, ITEMS)
        return sum(sizes), found

    kept, expected = kept_and_computed(False)
    less, found = kept_and_computed(True)
    assert less < kept / 2
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert "forward" not in vars(tiny_llama.model.layers[0])  # the layers are as they were


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("row_tokens", [16, 512])
def test_compiled_layers_compute_the_same(tiny_llama, vectors, row_tokens: int, recompute: bool):
    plain, compiled = (PrefixBackbone(tiny_llama, vectors, row_tokens) for _ in range(2))
    compiled.compiled, compiled.recompute = True, recompute
    for items in (ITEMS, ITEMS[:1]):  # another length
        expected, found = (loss_and_gradient(backbone, items) for backbone in (plain, compiled))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert "forward" not in vars(tiny_llama.model.layers[0])


def test_layers_that_cannot_be_computed_again(tiny_llama, vectors, monkeypatch):
    backbone = PrefixBackbone(tiny_llama, vectors)
    backbone.recompute = True
    monkeypatch.setattr("policypatch.model.parts.GradientCheckpointingLayer", torch.nn.Bilinear)
    with pytest.raises(PolicyPatchError, match=r"trainer\.recompute: LlamaForCausalLM has no layers"):
        loss_and_gradient(backbone, ITEMS)
    backbone.recompute, backbone.compiled = False, True
    with pytest.raises(PolicyPatchError, match=r"trainer\.compile: LlamaForCausalLM has no layers"):
        loss_and_gradient(backbone, ITEMS)
