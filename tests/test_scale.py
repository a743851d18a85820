"""Many processes compute what one does; a killed one is named; shards lose and repeat nothing; formulas meet counts."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

SCRIPT = Path(__file__).with_name("crew_script.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


def command(processes: int, *script: str) -> list[str]:
    if processes == 1:
        return [sys.executable, *script]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port),
            *script]


def train(out, strategy="ddp", processes=2, parts=4, steps=10, stop=0, pause=0.0):
    done = subprocess.run(command(processes, str(SCRIPT), str(out), strategy, *map(str, (parts, steps, stop, pause))),
                          env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    if not stop:
        return torch.load(out / "final.pt", weights_only=True), json.loads((out / "history.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of it, without Accelerate."""
    out = tmp_path_factory.mktemp("alone")
    return train(out, "alone", 1)


def same(run, other):
    """The same weights and losses; the same size of each gradient in the steps that both took since they were started."""
    near = lambda a, b: torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-4, atol=1e-5)
    for name in other[0]:
        near(run[0][name], other[0][name])
    (a, b) = run[1], other[1]
    near(a["losses"], b["losses"])
    near(a["figures"]["far"], b["figures"]["far"])
    near(a["norms"], b["norms"][-len(a["norms"]):])
    if a["watched"]:                                         # step 2 was before a resumed run's first
        near(a["watched"], b["watched"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_make_what_one_makes(tmp_path, alone, strategy):
    same(train(tmp_path, strategy), alone)


@pytest.mark.parametrize("first, then", [(("ddp", 2), ("fsdp", 1)), (("fsdp", 2), ("ddp", 1))])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, alone, first, then):
    train(tmp_path, *first, stop=6)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000004"] and not (tmp_path / "final.pt").exists()
    same(train(tmp_path, *then), alone)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000010"]
