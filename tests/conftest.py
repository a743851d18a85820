import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:         # several at once: a core each, for the processes that they start as well
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "book"))
torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
