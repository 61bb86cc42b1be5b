"""The BiLSTM in torch: against Keras' equations written out, and against the package's published scores."""

import numpy as np
import pytest
import torch

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.judges import BiLstmJudge
from policypatch.evaluate.judges.bilstm import LABELS, clean_text, read_network

h5py = pytest.importorskip("h5py")

WHEEL = {
    "wheel": "toxic-comment-classifier==0.3.0",
    "sha256": "e5af0f052dbb0493d585b5b486dd9b61ec13d54c0e3e2ad93c519114bb404948",
}
WEIGHTS = WHEEL | {"file": "toxic_classifier/model/model.weights.h5"}
WORDS = WHEEL | {"file": "toxic_classifier/model/tokenizer.pickle"}


@pytest.fixture
def weights(tmp_path):
    """Random weights in Keras' layout: vocabulary 11, width 4, hidden 3, dense 5, 6 labels."""
    draw = np.random.default_rng(0)
    path = tmp_path / "model.weights.h5"
    shapes = {
        "embedding": [(11, 4)],
        "bidirectional/forward_layer/cell": [(4, 12), (3, 12), (12,)],
        "bidirectional/backward_layer/cell": [(4, 12), (3, 12), (12,)],
        "dense": [(6, 5), (5,)],
        "dense_1": [(5, 6), (6,)],
    }
    with h5py.File(path, "w") as file:
        for layer, parts in shapes.items():
            for number, shape in enumerate(parts):
                file[f"layers/{layer}/vars/{number}"] = draw.normal(size=shape).astype("float32")
    return path


def keras_forward(path, ids):
    """Keras' documented equations, step by step: gates i, f, c, o; backward layer reads from the end."""

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    with h5py.File(path) as file:

        def get(name, n):
            return file[f"layers/{name}/vars/{n}"][()].astype("float64")

        x = get("embedding", 0)[ids]
        outputs = []
        for name, step in (("forward_layer", 1), ("backward_layer", -1)):
            kernel, recurrent, bias = (get(f"bidirectional/{name}/cell", n) for n in range(3))
            h = c = np.zeros((len(ids), len(recurrent)))
            states = []
            for t in range(ids.shape[1])[::step]:
                i, f, g, o = np.split(x[:, t] @ kernel + h @ recurrent + bias, 4, axis=1)
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                h = sigmoid(o) * np.tanh(c)
                states.append(h)
            outputs.append(np.stack(states).max(axis=0))
        pooled = np.concatenate(outputs, axis=1)
        hidden = np.maximum(pooled @ get("dense", 0) + get("dense", 1), 0)
        return sigmoid(hidden @ get("dense_1", 0) + get("dense_1", 1))


def test_network_equals_keras_equations(weights):
    ids = np.random.default_rng(1).integers(0, 11, (5, 9))
    ids[:, :3] = 0  # padding counts, as in Keras without a mask
    with torch.inference_mode():
        ours = read_network(weights)(torch.from_numpy(ids)).numpy()
    np.testing.assert_allclose(ours, keras_forward(weights, ids), atol=1e-6)


def test_a_file_without_the_layers_is_refused(tmp_path):
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file["layers/dense/vars/0"] = np.zeros((2, 2))
    with pytest.raises(PolicyPatchError, match=r"other\.h5"):
        read_network(path)


def test_an_unknown_label_is_refused_before_anything_is_read():
    with pytest.raises(PolicyPatchError, match="severe_toxic"):
        BiLstmJudge("missing.h5", "missing.pickle", label="rude")


def test_cleaning_keeps_words_and_four_marks():
    assert clean_text("See  https://x.org/a NOW!\nDon’t, ok? #1") == "see now! don t, ok? 1"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("label", "published"),
    zip(
        LABELS,
        [
            0.9889402985572815,
            0.07256772369146347,
            0.620429277420044,
            0.01934845559298992,
            0.8664075136184692,
            0.04072948172688484,
        ],
        strict=True,
    ),
)
def test_scores_equal_the_package_readme(label, published):
    """METADATA of the wheel, "Example Output": what Keras gives for this sentence, raw."""
    judge = BiLstmJudge(WEIGHTS, WORDS, label=label, clean=False)
    assert judge.score(["You are so dumb and stupid!"])[0] == pytest.approx(published, abs=2e-6)


@pytest.mark.slow
def test_real_judge_separates_and_ignores_batches():
    judge = BiLstmJudge(WEIGHTS, WORDS)
    texts = ["You are so dumb and stupid!", "What a lovely garden you have.", "The meeting is at noon."]
    scores = judge.score(texts)
    assert scores[0] > 0.9
    assert scores[1:].max() < 0.2
    one_by_one = BiLstmJudge(WEIGHTS, WORDS, batch_size=1)
    np.testing.assert_allclose(one_by_one.score(texts), scores, atol=1e-6)
    assert judge.fingerprint == one_by_one.fingerprint
    assert judge.fingerprint != BiLstmJudge(WEIGHTS, WORDS, clean=False).fingerprint
