"""A table of numbers as a picture: how loaded each expert of each layer is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WIDTH = 768  # pixels that the picture is wide at least, where cells of whole pixels allow it
TALLEST = 24  # pixels of a cell
FULL = 2.0  # powers of two from the mean, at which a colour is full
COLD, HOT = np.array([33, 102, 172]), np.array([178, 24, 43])  # of none and of four times the mean; white is the mean


def load_picture(load: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Returns `load` [layers, experts] as colours [height, width, 3], a row a layer, the first on top, and a column an expert.

    Colours are of the load over its layer's mean, on the scale of powers of two: white is 1, blue less and red more; a quarter
    and below, and four times and above, are full. A layer without any load is grey.
    """
    mean = load.mean(1, keepdims=True)
    ratio = np.divide(load, mean, out=np.ones_like(load, dtype=np.float64), where=mean > 0)
    place = np.clip(np.log2(np.maximum(ratio, 2.0**-FULL)) / FULL, -1, 1)[..., None]
    colour = 255 + np.abs(place) * (np.where(place < 0, COLD, HOT) - 255)
    colour = np.where(mean[..., None] > 0, colour, 128).astype(np.uint8)
    side = max(1, min(TALLEST, -(-WIDTH // load.shape[1])))
    return colour.repeat(side, 0).repeat(side, 1)
