"""Any sequence classifier, on a tiny random BERT saved in a folder."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.judges import HfClassifierJudge

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "day", "very", "a"]
TEXTS = ["a good day", "bad", "a very very bad bad day", "good good"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    folder = tmp_path_factory.mktemp("classifier")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        initializer_range=1.0,
        id2label={0: "neutral", 1: "toxic"},
        label2id={"neutral": 0, "toxic": 1},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def judge_of(folder, **changes):
    return HfClassifierJudge(**({"source": folder, "label": "toxic", "name": "tiny"} | changes))


def test_exclusive_labels_sum_to_one(classifier):
    toxic = judge_of(classifier).score(TEXTS)
    neutral = judge_of(classifier, label="neutral").score(TEXTS)
    np.testing.assert_allclose(toxic + neutral, 1, atol=1e-6)
    assert np.ptp(toxic) > 0.01


def test_sigmoid_looks_at_one_logit(classifier):
    """softmax over two logits a, b is sigmoid(b - a)."""
    logit = {
        label: np.log(s / (1 - s))
        for label in ("neutral", "toxic")
        for s in [judge_of(classifier, label=label, activation="sigmoid").score(TEXTS)]
    }
    expected = 1 / (1 + np.exp(logit["neutral"] - logit["toxic"]))
    np.testing.assert_allclose(judge_of(classifier).score(TEXTS), expected, atol=1e-5)


def test_batches_and_padding_do_not_change_scores(classifier):
    np.testing.assert_allclose(
        judge_of(classifier, batch_size=1).score(TEXTS), judge_of(classifier).score(TEXTS), atol=1e-6
    )


def test_long_texts_are_cut_to_the_positions(classifier):
    assert judge_of(classifier).score(["bad " * 100]).shape == (1,)


def test_a_label_can_be_an_index(classifier):
    np.testing.assert_array_equal(judge_of(classifier, label="1").score(TEXTS), judge_of(classifier).score(TEXTS))


def test_an_unknown_label_lists_the_known(classifier):
    with pytest.raises(PolicyPatchError, match=r"'rude'; it has neutral, toxic"):
        judge_of(classifier, label="rude")


def test_pickled_weights_are_refused(classifier, tmp_path):
    for path in classifier.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(PolicyPatchError, match="cannot load"):
        judge_of(tmp_path)


def from_hub(root, classifier, monkeypatch, commits):
    """A hub cache in which the branch main of org/tiny is the last of `commits`."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    repository = root / "models--org--tiny"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    for commit in commits:
        folder = repository / "snapshots" / commit
        folder.mkdir(parents=True, exist_ok=True)
        for path in classifier.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    (repository / "refs" / "main").write_text(commits[-1])


def test_a_hub_source_is_judged_anew_when_main_moves(classifier, tmp_path, monkeypatch):
    first, second = "1" * 40, "2" * 40
    main = OmegaConf.create({"hub": "org/tiny", "revision": "main"})
    from_hub(tmp_path, classifier, monkeypatch, [first])
    judge = judge_of(main)
    np.testing.assert_array_equal(judge.score(TEXTS), judge_of(classifier).score(TEXTS))
    assert judge_of({"hub": "org/tiny", "revision": first}).fingerprint == judge.fingerprint
    from_hub(tmp_path, classifier, monkeypatch, [first, second])
    assert judge_of(main).fingerprint != judge.fingerprint
    assert judge_of({"hub": "org/tiny", "revision": first}).fingerprint == judge.fingerprint


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("unitary/toxic-bert", r"judge tiny: .*write \{hub: unitary/toxic-bert\}"),
        ({"hub": "org/tiny", "branch": "main"}, r"judge tiny\.branch: no such key"),
    ],
)
def test_what_is_no_source_is_refused(source, message):
    with pytest.raises(PolicyPatchError, match=message):
        judge_of(source)


def test_a_file_is_no_classifier(classifier):
    with pytest.raises(PolicyPatchError, match=r"judge tiny: a classifier is a folder, and .*vocab\.txt is a file"):
        judge_of(classifier / "vocab.txt")


def test_fingerprint_follows_content_and_settings(classifier, tmp_path):
    for path in classifier.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    first = judge_of(classifier).fingerprint
    assert judge_of(tmp_path).fingerprint == first
    assert judge_of(classifier, batch_size=2).fingerprint == first
    assert judge_of(classifier, activation="sigmoid").fingerprint != first
    weights = tmp_path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert judge_of(tmp_path).fingerprint != first
