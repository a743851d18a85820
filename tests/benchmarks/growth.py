"""Row 5: how a step's time and memory grow with tokens, clip length, resolution and processes."""
import math
import os
import socket
import sys
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from harness import flops, interleaved, parameters, slope, spread
from peers import Grid, Ours
from sora_lite.sizes import peak_memory
from step import training_step

COLUMNS = {"grows": "", "tokens a clip": "d", "latents": "", "pixels": "", "GFLOP a step": ".3g", "ms a step": ".4g",
           "GFLOP/s": ".3g", "of peak": ".0%", "memory, MB": ".4g", "attention's scores, MB": ".3g"}


def scores_mb(grid: Grid, batch: int, depth: int, heads: int) -> float:
    """Memory of what attention keeps for the backward pass where it is plain products: the softmax's result, in half
    precision, and the scores in single; 0 beyond 512 tokens, where the fused kernel keeps neither."""
    n = math.prod(grid)
    return batch * depth * heads * n * n * 6 / 2 ** 20 if n <= 512 else 0.0


def pixels(grid: Grid) -> str:
    """The clip that such a grid of tokens stands for."""
    return f"{4 * grid[0] - 3} frames, {16 * grid[1]} x {16 * grid[2]}"


def explain(what: str, rows: list[dict]) -> list[str]:
    """Sentences on the fitted exponents of one direction of growth; an explanation only where its numbers bear it."""
    tokens, time_, work = ([row[k] for row in rows] for k in ("tokens a clip", "ms a step", "GFLOP a step"))
    speeds = [row["GFLOP/s"] for row in rows]
    (k, error), (k_work, _) = slope(tokens, [t["median"] for t in time_]), slope(tokens, work)
    said = f"{what}: time grows as tokens to the power of {k:.2f} ± {error:.2f}, operations as {k_work:.2f}"
    if abs(k - k_work) <= 2 * error:
        said += ": as the operations do, within two standard errors"
    elif k < k_work and speeds[-1] > 1.1 * speeds[0]:
        said += (f"; short clips leave the machine partly idle: {speeds[0]:.3g} GFLOP/s with {tokens[0]} tokens, "
                 f"{speeds[-1]:.3g} with {tokens[-1]}")
    elif k > k_work and speeds[-1] < 0.9 * speeds[0]:
        said += f"; operations become slower: {speeds[0]:.3g} GFLOP/s with {tokens[0]} tokens, {speeds[-1]:.3g} with {tokens[-1]}"
        below, above = ([s for n, s in zip(tokens, speeds) if (n > 512) == side] for side in (False, True))
        if below and above and max(above) < 0.9 * min(below):
            said += (f", and all clips of more than 512 tokens, where attention changes to the fused kernel, are below all "
                     f"shorter ones ({max(above):.0f} against {min(below):.0f})")
    else:
        said += "; the row measures nothing that explains the difference"
    lines, memory = [said + "."], [row["memory, MB"] for row in rows]
    if all(m > 0 for m in memory):
        k, error = slope(tokens, memory)
        said = f"{what}: memory above the weights grows to the power of {k:.2f} ± {error:.2f}"
        share = rows[-1]["attention's scores, MB"] / memory[-1]
        if abs(k - 1) <= 2 * error:
            said += ": in proportion to the tokens, within two standard errors"
        elif k > 1 and share > 0.1:
            said += f"; attention's scores, which grow as the square, are {share:.0%} of it with {tokens[-1]} tokens"
        elif k < 1:
            base = max(0.0, memory[0] - tokens[0] * (memory[-1] - memory[0]) / (tokens[-1] - tokens[0]))
            if base > 0.1 * memory[0]:
                said += f"; a straight line through the ends starts at {base:.0f} MB, which do not depend on tokens"
        lines.append(said + ".")
    return lines


def sizes(grids: dict[str, list[Grid]], *, model: dict, batch: int, seconds: float, peak: float, device: torch.device,
          least: int = 3) -> tuple[dict, list[str]]:
    """One table for all directions of growth, measured in turn, and what can be said about them."""
    every = sorted({grid for some in grids.values() for grid in some}, key=math.prod)
    torch.manual_seed(0)
    arms, facts = {}, {}
    for grid in every:
        ours = Ours(grid, **model).to(device).train()
        arms[grid] = training_step(ours, grid, batch, device)
        facts[grid] = dict(flops=flops(arms[grid]))
        arms[grid]()                                  # the optimiser's state is there before memory is watched
        with peak_memory(device) as memory:
            arms[grid]()
        config = ours.dit.config
        facts[grid] |= dict(mb=memory["mb"], scores=scores_mb(grid, batch, config["depth"], config["heads"]))
    times, _ = interleaved(arms, seconds=seconds, device=device, least=least, warm=1, desc="sizes")
    rows, lines = [], []
    for what, some in grids.items():
        mine = []
        for grid in sorted(some, key=math.prod):
            ms, work = spread(1000 * s for s in times[grid]), facts[grid]["flops"]
            speed = work / 1e6 / ms["median"]
            mine.append({"grows": what, "tokens a clip": math.prod(grid), "latents": f"{grid[0]} x {2 * grid[1]} x {2 * grid[2]}",
                         "pixels": pixels(grid), "GFLOP a step": work / 1e9, "ms a step": ms, "GFLOP/s": speed,
                         "of peak": speed / peak, "memory, MB": facts[grid]["mb"],
                         "attention's scores, MB": facts[grid]["scores"]})
        rows += mine
        lines += explain(what, mine)
    lines += explain("all tokens, however they come about", sorted({
        row["latents"]: row for row in rows}.values(), key=lambda row: row["tokens a clip"]))
    return dict(title="Sizes", columns=COLUMNS, rows=rows), lines


def _member(rank: int, world: int, port: int, model: dict, grid: Grid, batch: int, threads: int, rounds: int, box) -> None:
    """One of several training processes: the same weights, its own clips, gradients averaged."""
    torch.set_num_threads(threads)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.manual_seed(0)
    ours = Ours(grid, **model).train()
    step = training_step(DistributedDataParallel(ours) if world > 1 else ours, grid, batch, torch.device("cpu"))
    step(), step()
    with peak_memory(torch.device("cpu")) as memory:
        step()
    times = []
    for _ in range(rounds):
        dist.barrier()
        begun = time.perf_counter()
        step()
        dist.barrier()
        times.append(time.perf_counter() - begun)
    sent = torch.cat([p.detach().flatten() for p in ours.parameters()]).double().sum()
    # not by all_gather: DDP frees the process group while it holds the GIL, for which gloo waits to drop what it gathered
    box.put((rank, float(sent), times, memory["mb"]))
    dist.destroy_process_group()


def processes(counts: list[int], *, model: dict, grid: Grid, batch: int, rounds: int, cores: int,
              patience: float = 300) -> tuple[dict, list[str]]:
    """Step time with one process for all cores, and with several that share them (DDP over gloo), each with its own
    batch. On a GPU machine this row says nothing about GPUs, and is left out. patience: seconds after which processes
    that wait for each other are ended, with a TimeoutError."""
    rows, times, held, parts = [], {k: [] for k in counts}, {}, max(1, min(3, rounds // 4))
    context = mp.get_context("spawn")
    for part in range(parts):               # in turn, as everywhere
        for k in counts:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            box, threads = context.SimpleQueue(), max(1, cores // k)
            running = mp.spawn(_member, (k, port, model, grid, batch, threads, max(1, rounds // parts), box), k, join=False)
            limit = time.monotonic() + patience
            while not running.join(min(5, patience)):
                if time.monotonic() > limit:
                    for process in running.processes:
                        process.kill()
                        process.join()
                    raise TimeoutError(f"{k} processes did not end within {patience:g} seconds and were stopped")
            said = sorted(box.get() for _ in range(k))
            if len({sent for _, sent, *_ in said}) > 1:
                raise RuntimeError(f"{k} processes ended with different weights: their gradients were not averaged")
            times[k] += said[0][2]
            held[k] = max(held.get(k, 0.0), sum(mb for *_, mb in said))
            print(f"\rprocesses: {k} of {counts}, part {part + 1} of {parts}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for k in counts:
        rows.append({"processes": k, "threads each": max(1, cores // k), "ms a step": spread(1000 * s for s in times[k]),
                     "clips a second": spread(k * batch / s for s in times[k]), "memory of all, MB": held[k]})
    line = []
    if len(counts) > 1:
        first, last = rows[0]["clips a second"], rows[-1]["clips a second"]
        gain = last["median"] / first["median"]
        line = [f"{counts[-1]} processes on {cores} cores train {gain:.2f} times as many clips a second as {counts[0]}"]
        if first["median"] > last["median"] and counts[-1] > cores:
            line[0] += "; there are more processes than cores, so that they wait for each other"
        elif counts[-1] <= cores and first["q3"] < last["q1"]:
            line[0] += ": separate processes save more than their exchange of gradients costs"
        elif counts[-1] <= cores and first["q1"] > last["q3"]:
            line[0] += ": the exchange of gradients costs more than separate processes save"
        line[0] += "."
        grows = lambda at_first, at_last: math.log(at_last / at_first) / math.log(counts[-1] / counts[0])
        said = (f"processes: time grows as their number to the power of "
                f"{grows(*(rows[i]['ms a step']['median'] for i in (0, -1))):.2f}, operations as 1 (each has a batch of its own, "
                f"and the cores stay the same)")
        if min(held.values()) > 0:
            said += f"; memory above the weights as {grows(held[counts[0]], held[counts[-1]]):.2f}"
        line.append(said + ".")
    columns = {"processes": "d", "threads each": "d", "ms a step": ".4g", "clips a second": ".3g", "memory of all, MB": ".4g"}
    return dict(title="Processes (DDP, gloo; each with a batch of its own)", columns=columns, rows=rows), line


def measure(*, lengths: list[int], sides: list[int], model: dict, batch: int, counts: list[int], rounds: int,
            seconds: float, peak: float, device: torch.device, cores: int, least: int = 3) -> dict:
    """Row 5. lengths: latent frames of clips of 4 x 4 tokens a frame; sides: tokens a side of clips of 5 latent frames."""
    grids = {"clip length": [(t, 4, 4) for t in lengths], "resolution": [(5, s, s) for s in sides]}
    table, lines = sizes(grids, model=model, batch=batch, seconds=seconds, peak=peak, device=device, least=least)
    tables = [table]
    if device.type == "cpu":
        more, line = processes(counts, model=model, grid=(5, 4, 4), batch=batch, rounds=rounds, cores=cores)
        tables, lines = tables + [more], lines + line
    with torch.device("meta"):
        count = parameters(Ours((5, 4, 4), **model))
    return dict(title="How cost grows", tables=tables, verdicts=[], remarks=lines,
                equal=[f"model (ours, {count:,} parameters), batch ({batch} clips), words, optimiser (AdamW, fused), "
                       f"autocast to bfloat16, nothing compiled"])
