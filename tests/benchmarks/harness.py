"""What all rows of the benchmark share: the clock, the peak, the counting, what must be equal, and the table."""
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from sora_lite.video import write_atomically

ROOT = Path(__file__).resolve().parent.parent.parent
MARK = "<!-- rows -->"  # of book/benchmarks.md: what follows is written by `--keep`
TOLERANCE = 0.05        # by how much parameters may differ and still be called equal


# the clock

def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes, on the device too."""
    wait(device)
    begun = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begun


def interleaved(arms: dict[str, Callable[[], object]], *, seconds: float, device: torch.device, least: int = 3,
                most: int = 60, warm: int = 2, seed: int = 0, desc: str = "") -> tuple[dict, dict]:
    """Seconds of every repeat of every arm, and of its first call (which compiles).

    A round runs each arm once, in an order drawn anew, so that whatever else the machine does meets all arms alike, and
    the times of one round can be divided by each other. Rounds go on for `seconds`: never fewer than `least`, never
    more than `most`. The collector of garbage rests while the clock runs.
    """
    if not arms or min(least, most) < 1:
        raise ValueError(f"there must be an arm and at least one round, got {len(arms)} arms, {least} to {most} rounds")
    order, first, times = random.Random(seed), {}, {name: [] for name in arms}
    for name in tqdm(arms, desc=f"{desc}: warming up", mininterval=1):
        first[name] = timed(arms[name], device)
        for _ in range(warm - 1):
            arms[name]()
    begun, names = time.perf_counter(), list(arms)
    with tqdm(total=round(seconds), desc=f"{desc}: {len(arms)} in turn", unit="s", mininterval=1,
              bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]") as bar:
        for done in range(most):
            if done >= least and time.perf_counter() - begun > seconds:
                break
            order.shuffle(names)
            gc.collect()
            for name in names:
                gc.disable()
                try:
                    times[name].append(timed(arms[name], device))
                finally:
                    gc.enable()
                bar.n = min(bar.total, time.perf_counter() - begun)
                bar.refresh()
    return times, first


def in_turn(arms: dict[str, Callable[[], float]], *, seconds: float | dict[str, float], desc: str,
            used: dict[str, float] | None = None) -> dict[str, float]:
    """Give each arm `seconds` of its own clock, one number or one for each: always the one that has had the smallest
    share of its own runs next.

    An arm does a piece of work and returns the seconds that count. used: what earlier runs have had already.
    """
    due = seconds if isinstance(seconds, dict) else dict.fromkeys(arms, seconds)
    had = dict.fromkeys(arms, 0.0) | {k: v for k, v in (used or {}).items() if k in arms}
    share = lambda name: had[name] / due[name]
    given = lambda: sum(min(had[name], due[name]) for name in arms)        # earlier runs may have given more
    with tqdm(total=sum(due.values()), initial=given(), desc=desc, unit="s", mininterval=1,
              bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]") as bar:
        while share(name := min(had, key=share)) < 1:
            had[name] += arms[name]()
            bar.n = given()
            bar.refresh()
    return had


# numbers with a spread

def spread(values: Iterable[float]) -> dict:
    """Median, first and third quartile, and how many."""
    values = sorted(values)
    if not values:
        raise ValueError("there is nothing to take a median of")
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return dict(median=middle, q1=low, q3=high, n=len(values))


def ratio(slow: list[float], fast: list[float]) -> dict:
    """How many times faster, round by round: of quotients of one round, median and quartiles."""
    return spread(a / b for a, b in zip(slow, fast, strict=True))


def show(value: object, form: str = ".3g") -> str:
    """A cell of a table: a spread as `median (q1 to q3)`."""
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:{form}} ({value['q1']:{form}} to {value['q3']:{form}})"
    if isinstance(value, float):
        return f"{value:{form}}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def slope(x: list[float], y: list[float]) -> tuple[float, float]:
    """Exponent k of y ~ x^k and its standard error, by least squares of the logarithms (NaN for two points)."""
    if len(x) < 2 or min(*x, *y) <= 0:
        raise ValueError(f"an exponent needs two points above zero, got x {x} and y {y}")
    lx, ly = (torch.tensor(v, dtype=torch.float64).log() for v in (x, y))
    dx = lx - lx.mean()
    k = (dx * ly).sum() / dx.square().sum()
    rest = (ly - ly.mean() - k * dx).square().sum()
    error = (rest / (len(x) - 2) / dx.square().sum()).sqrt() if len(x) > 2 else float("nan")
    return float(k), float(error)


# what a contender is, counted

def parameters(module: nn.Module) -> int:
    """Trainable numbers of a module."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def flops(work: Callable[[], object]) -> int:
    """Operations of `work`'s matrix products and convolutions. Attention is run as plain products meanwhile: the
    CPU's fused kernel is one that the counter does not know."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


class Seen:
    """What passes through a block, seen by hooks: how many tokens of what width, and in which number format its
    first matrix multiplies. `with Seen(block) as seen: work()`."""

    def __init__(self, block: nn.Module):
        self.block, self.numbers, self.dtype = block, 0, None

    def __enter__(self) -> "Seen":
        def entered(module, args, named):
            self.numbers = (args[0] if args else named["hidden_states"]).numel()

        def left(module, args, out):
            self.dtype = out.dtype

        linear = next(m for name, m in self.block.named_modules()
                      if isinstance(m, nn.Linear) and not name.startswith(("norm", "adaLN")))
        self.hooks = [self.block.register_forward_pre_hook(entered, with_kwargs=True),
                      linear.register_forward_hook(left)]
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()


def equal(what: str, values: dict[str, object], tolerance: float = 0.0) -> str:
    """A sentence that says what is equal; ValueError if it is not. Numbers may differ by the tolerance, as a share
    of the first."""
    first, *others = values.values()
    for name, value in list(values.items())[1:]:
        near = abs(value - first) <= tolerance * abs(first) if tolerance else value == first
        if not near:
            raise ValueError(f"{what} must be equal{f' within {tolerance:.0%}' if tolerance else ''}, but "
                             f"{next(iter(values))} has {show(first)} and {name} {show(value)}: nothing is compared")
    if tolerance and others:
        return f"{what} ({show(min(values.values()))} to {show(max(values.values()))})"
    return f"{what} ({show(first)})"


# the machine

def peak(device: torch.device, dtype=torch.bfloat16, size: int = 2048, repeats: int = 7) -> float:
    """The most operations a second that a square matrix product reached on this machine, in GFLOP/s."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2e-9 * size ** 3 / min(timed(lambda: a @ b, device) for _ in range(repeats))


def instructions() -> str:
    """Which vector instructions PyTorch's own kernels use, and up to which oneDNN may go."""
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return (f"{torch.backends.cpu.get_cpu_capability()}{' with AMX tiles' if amx else ''}, oneDNN "
            f"{f'up to {limit}' if limit and limit != 'DEFAULT' else 'free to choose'}")


def machine(device: torch.device) -> dict:
    """What the numbers were measured on."""
    import diffusers

    cpu = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), "") if Path("/proc/cpuinfo").is_file() else platform.processor()
    git = lambda *args: subprocess.run(["git", *args], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    return dict(device=torch.cuda.get_device_name() if device.type == "cuda" else cpu,
                cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
                threads=torch.get_num_threads(), instructions=instructions(), load=round(os.getloadavg()[0], 2),
                torch=torch.__version__, diffusers=diffusers.__version__, commit=git("rev-parse", "--short", "HEAD"),
                changed=bool(git("status", "--porcelain", "--untracked-files=no", "sora_lite", "tests/benchmarks")),
                when=time.strftime("%Y-%m-%d %H:%M"))


def greet(host: dict, device: torch.device) -> None:
    """Say what the numbers are measured on, and warn where others use it."""
    print(f"{host['device']}, {host['cores']} cores, {host['threads']} threads, {host['instructions']}")
    changed = " (changed)" if host["changed"] else ""
    print(f"torch {host['torch']}, diffusers {host['diffusers']}, commit {host['commit']}{changed}")
    if device.type == "cpu" and host["load"] > 0.3 * host["cores"]:
        print(f"WARNING: a load of {host['load']}: others use this machine, and the times below will not hold")


# the result

def table(rows: list[dict], columns: dict[str, str]) -> str:
    """Rows as Markdown. columns: {heading: format}; a heading with an empty format is text."""
    align = ["---" if not form else "---:" for form in columns.values()]
    lines = [list(columns), align] + [[show(row.get(name, ""), form or "") for name, form in columns.items()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdict(what: str, measured: dict, target: float) -> dict:
    """Whether a target is met: the median says it, and the quartiles how surely."""
    met = measured["median"] >= target
    sure = "" if (measured["q1"] >= target) == (measured["q3"] >= target) else ", and the quartiles lie on both sides"
    return dict(what=what, measured=measured, target=target, met=met,
                sentence=f"{what}: {show(measured)} times, target {target:g}: {'met' if met else 'MISSED'}{sure}")


def verdicts(made: list[dict]) -> str:
    """What was asked of a row and what it gave, as Markdown. Nothing measured: ours never got there."""
    def said(v: dict) -> str:
        seen = v["measured"]
        return ("met" if v["met"] else "**missed**") + (", on the line" if seen and seen["q1"] < v["target"] < seen["q3"] else "")

    return table([{"what": v["what"], "measured": show(v["measured"] or "not reached"), "target": f"{v['target']:g}", "": said(v)}
                  for v in made], {"what": "", "measured": "d", "target": "d", "": ""})


def markdown(result: dict) -> str:
    """A row's result as a page: what was asked and what came out, a picture, the table or tables, what was equal, and remarks."""
    parts = [f"## {result['title']}"] + ([verdicts(result["verdicts"])] if result.get("verdicts") else [])
    parts += [result["picture"]] if result.get("picture") else []
    for made in result["tables"]:
        parts += ([f"**{made['title']}**"] if made.get("title") else []) + [table(made["rows"], made["columns"])]
    missed = [v["sentence"] for v in result.get("verdicts", []) if not v["met"]]         # with where the time goes
    lines = [f"Equal: {sentence}." for sentence in result["equal"]] + missed + result.get("remarks", [])
    return "\n\n".join(parts + (["\n".join(f"- {line}" for line in lines)] if lines else [])) + "\n"


def draw(results: Iterable[dict], path: Path) -> None:
    """A picture of every speed that has a target: how many times as fast, median and quartiles, and the target."""
    import matplotlib.pyplot as plt
    from sora_lite.lab import COLORS

    made = [v for result in results for v in result.get("verdicts", []) if v["measured"] and v["target"] > 0]
    if not made:
        return
    fig, ax = plt.subplots(figsize=(8, 0.8 + 0.24 * len(made)))
    for y, v in enumerate(made):
        seen, color = v["measured"], COLORS["blue" if v["met"] else "orange"]
        ax.plot([seen["q1"], seen["q3"]], [y, y], color=color, lw=3, alpha=0.4, solid_capstyle="round")
        ax.plot(seen["median"], y, "o", color=color, ms=5)
        ax.plot(v["target"], y, "|", color="black", ms=11, mew=1.4)
    ax.axvline(1, color="black", lw=0.8, ls=":")
    ax.set(xscale="log", ylim=(len(made) - 0.4, -0.6), xlabel="times as fast (black stroke: the target; dotted: equal)")
    ax.set_xticks([0.5, 1, 2, 3, 5, 8], ["0.5", "1", "2", "3", "5", "8"])
    ax.minorticks_off()
    ax.set_yticks(range(len(made)), [v["what"] for v in made], fontsize=8)
    ax.grid(axis="x", alpha=0.3)
    save(fig, path)


def save(fig, path: Path) -> None:
    """A Matplotlib figure as an SVG that is small, and equal for equal numbers; the figure is closed."""
    import matplotlib.pyplot as plt

    for ax in fig.axes:
        ax.spines[["top", "right"]].set_visible(False)
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sora-lite"}):
        write_atomically(path, lambda p: fig.savefig(p, format="svg", bbox_inches="tight", metadata={"Date": None}))
    plt.close(fig)


def keep(folder: Path, name: str, result: dict) -> None:
    """Write a row's result as JSON and as Markdown; either is whole or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.json", lambda p: p.write_text(json.dumps(result, indent=1) + "\n"))
    write_atomically(folder / f"{name}.md", lambda p: p.write_text(markdown(result)))


def keep_in_book(results: dict[str, dict]) -> None:
    """Write rows {number: result} to book/benchmarks.json, beside the rows that are there, and all of them to the page,
    under a picture of their verdicts."""
    page = ROOT / "book" / "benchmarks.md"
    path = page.with_suffix(".json")
    kept = dict(sorted(((json.loads(path.read_text()) if path.is_file() else {}) | results).items()))
    write_atomically(path, lambda p: p.write_text(json.dumps(kept, indent=1) + "\n"))
    shown = "\n".join(f"{markdown(result)}\n{measured_on(result)}\n" for result in kept.values())
    head = page.read_text().split(MARK)[0]
    picture = page.parent / "static" / "benchmarks.svg"
    draw(kept.values(), picture)
    if picture.is_file():
        shown = ("![Times as fast as the peers](static/benchmarks.svg)\n\n*How many times as fast as its peers ours is: median and "
                 f"quartiles. Blue reaches its target, orange misses it.*\n\n{shown}")
    write_atomically(page, lambda p: p.write_text(f"{head}{MARK}\n\n{shown}"))
    print(f"kept in {path} and {page}")


def measured_on(result: dict) -> str:
    """A sentence on where, when and how long a row was measured."""
    host = result["machine"]
    peak = f"; a product of matrices reaches {host['peak_gflops']:.0f} GFLOP/s in bfloat16" if "peak_gflops" in host else ""
    took = f"{result['hours']:.1f} hours" if "hours" in result else f"{result['seconds'] / 60:.0f} min"
    return (f"*{host['device']}, {host['cores']} cores, {host['threads']} threads, {host['instructions']}{peak}; torch "
            f"{host['torch']}, diffusers {host['diffusers']}; commit {host['commit']}"
            f"{' and changes to it' if host.get('changed') else ''}, {host['when']}, {took}.*")


def noise(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
