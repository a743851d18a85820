"""Trains a small model for `test_scale.py`: python crew_script.py out strategy parts steps stop_after pause."""
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

from sora_lite.crew import Crew, accelerator, in_shards, whole_state
from sora_lite.train import fit

out, strategy, parts, steps, stop, pause = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]), float(sys.argv[6])
torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x):
        return x + self.down(self.up(x).tanh())


class Small(nn.Module):
    rim = ("leave",)

    def __init__(self):
        super().__init__()
        self.blocks, self.leave = nn.ModuleList([Block(), Block()]), nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


def batch(step, generator):
    time.sleep(pause)
    if stop and step == stop:
        raise KeyboardInterrupt                     # the run is given up after `stop` steps; its checkpoints stay
    return torch.randn(8, 6, generator=generator)


def loss(model, x, generator):
    noise = 0.1 * torch.randn(x.shape, generator=generator)
    gap = model(x + noise) - x[:, :3].sin()
    return gap.square().mean(), {"far": gap.detach().abs().max()}


def watch(step):
    watched.append(sum(float(x.double().abs().sum()) for x in whole_state(model).values()))


torch.manual_seed(0)
model, watched, norms, engine = Small(), [], [], None
clip = torch.nn.utils.clip_grad_norm_


def clip_and_tell(params, limit):
    whole = lambda x: x.full_tensor() if hasattr(x, "to_local") else x
    norms.append([float(whole(p.grad).norm()) for p in params])         # AdamW and Muon would hide a wrong factor
    return clip(params, limit)


torch.nn.utils.clip_grad_norm_ = clip_and_tell
if strategy != "alone":
    engine = Crew(accelerator("cpu", timeout=20))
    if strategy == "fsdp":
        in_shards(model, engine)
    print(f"rank {engine.rank} is process {os.getpid()}\n", end="", flush=True)     # in one write: another process prints too
try:
    history = fit(model, batch, loss, steps=steps, warmup=3, seed=1, parts=parts, engine=engine, bf16=False, clip=0.5,
                  ema=0.9, folder=out, save_every=4, desc="small", watch=watch, watch_at=[2])
except KeyboardInterrupt:
    sys.exit()
state = whole_state(model)
if engine is None or engine.speaks:
    torch.save(state, Path(out) / "final.pt")
    (Path(out) / "history.json").write_text(json.dumps(vars(history) | {"watched": watched, "norms": norms}))
