"""Row 1: a training step of our DiT beside diffusers' transformers, at equal parameters, tokens, batch and precision."""
import math
from contextlib import ExitStack

import torch
import torch.nn.functional as F

from harness import TOLERANCE, Seen, equal, flops, interleaved, noise, parameters, ratio, spread, verdict
from peers import BESIDE, CHANNELS, WORDS, WORDS_WIDTH, Contender, Grid, build
from sora_lite.train import compiled

TARGETS = {"Wan": 2.0, "CogVideoX": 1.5}            # times faster
OURS = ("ours", "ours, plain")                      # both are held against them: what is gained must not be work left out
COLUMNS = {"contender": "", "": "", "ms a step": ".3g", "ours is faster": ".2f", "ours, plain, is faster": ".2f",
           "GFLOP a step": ".3g", "GFLOP/s": ".3g", "of peak": ".0%", "first call, s": ".2g", "parameters": "d", "sizes": ""}


def training_step(model: Contender, grid: Grid, batch: int, device: torch.device):
    """A function that does one step: velocity of mixed latents, forward and backward under autocast to bfloat16, and
    AdamW. All contenders get the same numbers."""
    shape = batch, CHANNELS, grid[0], 2 * grid[1], 2 * grid[2]
    clean, eps, words = noise(shape, 1, device), noise(shape, 2, device), noise((batch, WORDS, WORDS_WIDTH), 3, device)
    t = torch.rand(batch, generator=torch.Generator().manual_seed(4)).to(device)
    mixed = torch.lerp(clean, eps, t.view(-1, 1, 1, 1, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.mse_loss(model(mixed, t, words), eps - clean)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def compare(title: str, sizes: dict, grid: Grid, *, batch: int, seconds: float, peak: float, forms: tuple[str, ...],
            device: torch.device, least: int = 3) -> tuple[dict, list[dict], list[str]]:
    """One table: ours, ours without convolutions and the peers, all with as many parameters, each in every form
    ("eager", "compiled")."""
    facts, arms, models = {}, {}, {}
    for name in ("ours", *BESIDE):
        for form in forms:
            model, said = build(name, grid, sizes)
            model.to(device).train()
            work = training_step(model, grid, batch, device)
            if form == forms[0]:        # counted and looked at before anything is compiled
                with Seen(model.blocks[0]) as seen:
                    work()
                facts[name] = dict(sizes=said, parameters=parameters(model), dtype=seen.dtype,
                                   tokens=seen.numbers // model.width, flops=flops(work))
            arms[name, form], models[name, form] = work, model
    fact = lambda key: {name: one[key] for name, one in facts.items()}
    same = [equal("parameters", fact("parameters"), TOLERANCE), equal("tokens in a batch", fact("tokens")),
            equal("number format of the blocks' products", fact("dtype"))]
    if facts["ours"]["tokens"] != batch * math.prod(grid):
        raise ValueError(f"{facts['ours']['tokens']} tokens passed, of {batch} clips of {math.prod(grid)}")
    with ExitStack() as stack:
        for (name, form), model in models.items():
            if form == "compiled":
                stack.enter_context(compiled(model.blocks, device))
        times, first = interleaved(arms, seconds=seconds, device=device, least=least, desc=title)
    torch.compiler.reset()
    rows, verdicts = [], []
    for (name, form), seen in times.items():
        ms = spread(1000 * s for s in seen)
        speed = facts[name]["flops"] / 1e6 / ms["median"]
        faster = {mine: ratio(seen, times[mine, form]) for mine in OURS}
        rows.append({"contender": name, "": form, "sizes": facts[name]["sizes"], "parameters": facts[name]["parameters"],
                     "GFLOP a step": facts[name]["flops"] / 1e9, "ms a step": ms, "GFLOP/s": speed,
                     "of peak": speed / peak, "ours is faster": faster["ours"],
                     "ours, plain, is faster": faster["ours, plain"], "first call, s": first[name, form]})
        for mine in OURS if name in TARGETS else []:
            verdicts.append(verdict(f"{title}: {mine} faster than {name}, both {form}", faster[mine], TARGETS[name]))
            if not verdicts[-1]["met"]:
                row = next(row for row in rows if row["contender"] == mine and row[""] == form)
                verdicts[-1]["sentence"] += (
                    f" ({mine}: {row['GFLOP a step']:.3g} GFLOP at {row['of peak']:.0%} of the measured peak; {name}: "
                    f"{facts[name]['flops'] / 1e9:.3g} GFLOP at {speed / peak:.0%})")
    return dict(title=title, columns=COLUMNS, rows=rows), verdicts, same


def measure(*, settings: list, batch: int, seconds: float, peak: float, forms: tuple[str, ...], device: torch.device,
            least: int = 3) -> dict:
    """Row 1. settings: (title, sizes of our DiT, grid of tokens) of each comparison, which share the `seconds`."""
    made = [compare(title, sizes, grid, batch=batch, seconds=seconds / len(settings), peak=peak, forms=forms,
                    device=device, least=least) for title, sizes, grid in settings]
    return dict(title="A training step", tables=[table for table, _, _ in made],
                verdicts=[v for _, verdicts, _ in made for v in verdicts],
                equal=[f"batch ({batch} clips), words ({WORDS} of {WORDS_WIDTH} channels), loss, optimiser (AdamW, fused), "
                       f"numbers that go in, and what is compiled (the blocks)"]
                + [f"{table['title']}: " + ", ".join(same) for table, _, same in made],
                remarks=["At equal parameters operations are not equal: convolutions use each weight once a cell, four "
                         "times a token. \"ours\" is chapter 5's transformer with its convolutions; \"ours, plain\" has none "
                         "and is wider. The column of GFLOP says how much each contender computes."])
