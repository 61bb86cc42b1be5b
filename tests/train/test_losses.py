"""The losses against values worked out by hand, their gradients, and what batching must not change."""

import math

import pytest
import torch

from policypatch.train.losses import balance_loss, dpo_loss, mean_nll, sequence_lengths, sft_loss


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_dpo_loss_is_ln_2_where_policy_and_reference_agree():
    """The margin is 0, and -log sigmoid(0) = -log(1/2) = ln 2 = 0.693147, whatever beta and smoothing."""
    logprobs = tensor(-3.0, -8.0, -120.0)
    for beta, smoothing in ((0.1, 0.0), (5.0, 0.0), (0.1, 0.3)):
        out = dpo_loss(logprobs, logprobs - 2, logprobs, logprobs - 2, beta, smoothing)
        torch.testing.assert_close(out.loss, torch.full((3,), math.log(2), dtype=torch.float64))


def test_dpo_loss_by_hand():
    """Chosen -10 (reference -12), rejected -20 (reference -15), beta 0.1.

    Rewards: 0.1 * (-10 + 12) = 0.2 and 0.1 * (-20 + 15) = -0.5. Margin: 0.7.
    sigmoid(0.7) = 1 / (1 + e^-0.7) = 1 / 1.4965853 = 0.6681878, and -ln 0.6681878 = 0.4031860.
    """
    out = dpo_loss(tensor(-10), tensor(-20), tensor(-12), tensor(-15), 0.1)
    torch.testing.assert_close(out.chosen_reward, tensor(0.2))
    torch.testing.assert_close(out.rejected_reward, tensor(-0.5))
    assert out.loss.item() == pytest.approx(0.4031860, abs=1e-7)


def test_label_smoothing_by_hand():
    """The same margin of 0.7 with one label in ten wrong.

    -ln sigmoid(-0.7) = 0.7 + 0.4031860 = 1.1031860; 0.9 * 0.4031860 + 0.1 * 1.1031860 = 0.4731860: the plain loss
    plus smoothing times margin.
    """
    out = dpo_loss(tensor(-10), tensor(-20), tensor(-12), tensor(-15), 0.1, 0.1)
    assert out.loss.item() == pytest.approx(0.4731860, abs=1e-7)


def test_sft_loss_by_hand():
    """Sums -6 over 3 tokens and -4 over 1 token: 2 and 4 nats a token, mean over completions 3 (not 10 / 4)."""
    sums, lengths = tensor(-6, -4), torch.tensor([3, 1])
    torch.testing.assert_close(mean_nll(sums, lengths), tensor(2, 4))
    assert sft_loss(sums, lengths).item() == 3.0


def test_sequence_lengths_count_the_tokens_of_each_completion():
    assert sequence_lengths(torch.tensor([0, 0, 2, 2, 2, 1]), 4).tolist() == [2, 1, 3, 0]


def test_extreme_margins_stay_finite():
    """-log sigmoid(-1000) = 1000 and -log sigmoid(1000) = e^-1000 = 0: no log of an underflowed sigmoid."""
    out = dpo_loss(torch.tensor([-1e4, 0.0]), torch.tensor([0.0, -1e4]), torch.zeros(2), torch.zeros(2), 0.1)
    assert out.loss.tolist() == [1000.0, 0.0]


def test_dpo_gradient_raises_chosen_and_lowers_rejected():
    """d loss / d chosen = -beta * sigmoid(-margin); at margin 0 that is -beta / 2, and +beta / 2 for rejected."""
    chosen, rejected = tensor(-5, -5).requires_grad_(), tensor(-7, -7).requires_grad_()
    dpo_loss(chosen, rejected, tensor(-5, -5), tensor(-7, -7), 0.4).loss.sum().backward()
    torch.testing.assert_close(chosen.grad, tensor(-0.2, -0.2))
    torch.testing.assert_close(rejected.grad, tensor(0.2, 0.2))


def test_sft_gradient_raises_every_completion_by_its_length():
    sums = tensor(-6, -4).requires_grad_()
    sft_loss(sums, torch.tensor([3, 1])).backward()
    torch.testing.assert_close(sums.grad, tensor(-1 / 6, -1 / 2))


def test_rewards_carry_no_gradient():
    out = dpo_loss(tensor(-1).requires_grad_(), tensor(-2), tensor(-1), tensor(-2), 0.1)
    assert out.loss.requires_grad
    assert not out.chosen_reward.requires_grad
    assert not out.rejected_reward.requires_grad


@pytest.mark.parametrize("split", [1, 2, 4])
def test_a_split_batch_averages_to_the_whole(split: int):
    generator = torch.Generator().manual_seed(0)
    sums = -20 * torch.rand(4, 8, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 20, (8,), generator=generator)
    whole, parts = dpo_loss(*sums, 0.3, 0.05).loss.mean(), []
    sft_whole, sft_parts = sft_loss(sums[0], lengths), []
    for start in range(0, 8, split):
        rows = slice(start, start + split)
        parts.append(dpo_loss(*sums[:, rows], 0.3, 0.05).loss.mean())
        sft_parts.append(sft_loss(sums[0, rows], lengths[rows]))
    torch.testing.assert_close(torch.stack(parts).mean(), whole)
    torch.testing.assert_close(torch.stack(sft_parts).mean(), sft_whole)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_dpo_loss_is_trls(beta: float, smoothing: float):
    """`DPOTrainer`, loss_type "sigmoid": -logsigmoid(beta * logits) * (1 - eps) - logsigmoid(-beta * logits) * eps,

    with logits = (policy chosen - policy rejected) - (reference chosen - reference rejected).
    """
    generator = torch.Generator().manual_seed(1)
    chosen, rejected, ref_chosen, ref_rejected = -50 * torch.rand(4, 16, generator=generator, dtype=torch.float64)
    logits = (chosen - rejected) - (ref_chosen - ref_rejected)
    log_sigmoid = torch.nn.functional.logsigmoid
    theirs = -log_sigmoid(beta * logits) * (1 - smoothing) - log_sigmoid(-beta * logits) * smoothing
    ours = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, smoothing)
    torch.testing.assert_close(ours.loss, theirs)


def test_balance_loss_by_hand():
    """Log-probabilities -2 and -3, d = 1: sigmoid(1) = 0.7310586, sigmoid(-1) = 0.2689414.

    -(ln 0.7310586 + ln 0.2689414) / 2 = (0.3132617 + 1.3132617) / 2 = 0.8132617, less ln 2 = 0.6931472: 0.1201145.
    For d = 100 it is 100 / 2 - ln 2 = 49.3068528; where both are as likely it is 0.
    """
    found = balance_loss(tensor(-2, -3, -4, -150), tensor(-3, -2, -4, -50))
    torch.testing.assert_close(found, tensor(0.1201145, 0.1201145, 0, 49.3068528), atol=1e-7, rtol=0)


def test_balance_loss_moves_the_two_towards_each_other():
    """Its derivative by the first is tanh(d / 2) / 2: for d = 2, 0.7615942 / 2 = 0.3807971, and the other way round."""
    first, second = tensor(-3).requires_grad_(), tensor(-5).requires_grad_()
    balance_loss(first, second).sum().backward()
    assert first.grad.item() == pytest.approx(0.3807971, abs=1e-7)
    assert second.grad.item() == pytest.approx(-0.3807971, abs=1e-7)


def test_balance_loss_is_dpo_with_labels_that_are_right_half_of_the_time():
    first, second, nothing = tensor(-2.5, -7), tensor(-3, -4), tensor(0, 0)
    both = [dpo_loss(a, b, nothing, nothing, 1.0).loss for a, b in ((first, second), (second, first))]
    torch.testing.assert_close(balance_loss(first, second), (both[0] + both[1]) / 2 - math.log(2))
