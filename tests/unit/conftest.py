"""Unit tests work on small tensors: more than one thread would only wait."""

import torch

torch.set_num_threads(1)
