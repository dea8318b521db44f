"""Scikit-learn's handwritten digits, which come with the package: three parts, shifted batches."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32
from sklearn.datasets import load_digits

#: Images for choosing settings and for the numbers that are reported; the rest is trained on.
VALIDATION, HELD_OUT = 300, 500
#: The pixels by which a training image moves at most, up or down and left or right.
SHIFT = 1


@dataclass(frozen=True)
class Digits:
    """Images and what they show.

    Attributes:
        images: Eight by eight pixels between 0 and 1.
        labels: The digits.
    """

    images: Float32[np.ndarray, "count 8 8 1"]
    labels: Int32[np.ndarray, " count"]


def load_parts() -> dict[str, Digits]:
    """Returns the 1797 images in three parts, always the same: train, validation and held_out."""
    loaded: Any = load_digits(return_X_y=True)
    pixels, labels = loaded
    images = np.float32(np.asarray(pixels) / 16).reshape(-1, 8, 8, 1)
    # Neighbours in the file were written by one hand.
    order = np.random.Generator(np.random.Philox(key=0)).permutation(len(images))
    cuts = [len(images) - HELD_OUT - VALIDATION, len(images) - HELD_OUT]
    return {
        part: Digits(images[chosen], np.asarray(labels, np.int32)[chosen])
        for part, chosen in zip(
            ("train", "validation", "held_out"), np.split(order, cuts), strict=True
        )
    }


def digits_batch(digits: Digits, *, seed: int, step: int, batch_size: int) -> Digits:
    """Returns the images of one step, each moved a little: a pure function of seed and step."""
    random = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
    chosen = random.integers(0, len(digits.images), batch_size)
    padded = np.pad(digits.images[chosen], [(0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)])
    row, column = random.integers(0, 2 * SHIFT + 1, (2, batch_size, 1, 1))
    rows, columns = row + np.arange(8)[:, None], column + np.arange(8)
    images = padded[np.arange(batch_size)[:, None, None], rows, columns]
    return Digits(images, digits.labels[chosen])
