"""Shapes of Llama-like bases: what decides how long they take and how much memory, whatever their weights are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A Llama-like base.

    Attributes:
        width: D of the embeddings.
        inner: of a layer's MLP.
        keys: width of all keys of a token (less than D where heads share them).
        head: width of an attention head.
        tied: whether the head is the embedding matrix.
    """

    name: str
    layers: int
    width: int
    inner: int
    keys: int
    vocabulary: int
    tied: bool = False
    head: int = 128

    @property
    def layer(self) -> int:
        """Weights of a layer: queries and output, keys and values, the gated MLP."""
        return self.width * (2 * self.width + 2 * self.keys + 3 * self.inner)

    @property
    def whole(self) -> int:
        """Weights outside of the layers."""
        return self.vocabulary * self.width * (1 if self.tied else 2)


SHAPES = (
    Shape("7B", 32, 4096, 11008, 4096, 32000),
    Shape("13B", 40, 5120, 13824, 5120, 32000),
    Shape("70B", 80, 8192, 28672, 1024, 32000),
)
SMOLLM2 = Shape("SmolLM2-135M", 30, 576, 1536, 192, 49152, tied=True, head=64)
