"""The same start for every test: one thread, one seed, no window."""

import matplotlib
import pytest
import torch
from lightning.pytorch import seed_everything

matplotlib.use("Agg")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    seed_everything(0, verbose=False)
