"""Row 3: minutes to 80% and 90% prompt fidelity, our recipe beside diffusers' Wan transformer with a plain one.

`make bench-fidelity`, or `python tests/benchmarks/fidelity.py --minutes 20`. It runs for hours. Each contender
begins such a training with three learning rates, and after a third of it the best goes on (successive halving, Jamieson
2016): ours to its end and under two seeds more, the plain recipe anew under three seeds for three times as long, which
is what it would need to be within the target. Every minute of a training is written down, and a killed run goes on where it
stopped.

The clock is the first thing that is measured: the seconds of a step of each kind, in turns, on the machine as it is then
(it should have nothing else to do for these minutes). A training's minutes are its steps times that, so what else the
machine does in the hours that follow changes nothing, nor does another machine: the clock and the curve of each training lie
in record.json, a few kilobytes that `--keep` puts into the book after each stage, and `--go-on` continues from there.
`--seeds 1`, later 2 and 3, spreads the row over several evenings.
"""
import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
import argparse
import io
import json
import math
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import sora_lite  # noqa: F401 -- first: on some machines it must tell oneDNN to do without AMX
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import harness
from harness import ROOT, TOLERANCE, equal, interleaved, parameters, spread
from peers import AsDiT, build
from sora_lite.lab import fingerprint
from sora_lite.pipeline import Denoiser, SoraLite, encode_world, flow_loss
from sora_lite.shapes import Shapes, vocabulary
from sora_lite.sizes import score_at
from sora_lite.text import TextEncoder, words_of
from sora_lite.train import averaged, compiled, generator_of, keep_memory, load_checkpoint, optimizers, rate
from sora_lite.vae import VideoVAE
from sora_lite.video import write_atomically
from sora_lite.worlds import world_of

KEPT = ROOT / "book" / "fidelity.json"           # clock and curves behind the row in the book
GRID, PIXELS = (5, 4, 4), (17, 64, 64)          # 80 tokens; frames, height, width
MARKS, TARGET = (0.8, 0.9), 3.0
RATES = {"ours": (1e-3, 2e-3, 4e-3), "Wan": (3e-4, 1e-3, 3e-3)}     # ours: Muon's rate is ten times AdamW's


def plain_loss(model: Denoiser, batch: tuple[list[Tensor], list[str]], generator: torch.Generator) -> Tensor:
    """Rectified flow with uniform times, a tenth of the captions dropped, and nothing else."""
    x0, captions = torch.stack(batch[0]), batch[1]
    coin = torch.rand(len(x0), generator=generator)
    captions = [None if c < 0.1 else text for c, text in zip(coin.tolist(), captions)]
    t = torch.rand(len(x0), generator=generator).to(x0.device)
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    features, counts = model.text(captions)
    words = nn.utils.rnn.pad_sequence(features.split(counts), batch_first=True)
    said = model.dit.model(torch.lerp(x0, eps, t.view(-1, 1, 1, 1, 1)), t, words)
    return F.mse_loss(said, eps - x0)


class Recipe:
    """A contender in training: model, optimisers, average of its weights, and its curve of (minutes, prompt fidelity,
    share of all attributes that are right) at each look.

    A call trains to its next look, or for at most a minute, and writes itself down: what it needs to go on beside the
    record, its curve into the record. It returns the seconds of training that this is on the clock. clock: seconds of a
    step of each kind of batch, without which nothing is trained. What judges, what reads clips and what compiles is not on
    the clock.
    """
    KINDS = {"ours": ("images", "beginnings", "clips"), "Wan": ("clips",)}

    def __init__(self, name: str, lr: float, seed: int, *, minutes: float, looks: int, batch: int, prompts: int, sizes: dict,
                 vae: VideoVAE, whose: str, pool: dict, folder: Path, device: torch.device,
                 clock: dict[str, float] | None = None):
        self.name, self.lr, self.looks, self.batch, self.clock = name, lr, looks, batch, clock
        self.prompts, self.pool, self.device, self.vae = prompts, pool, device, vae
        torch.manual_seed(seed)
        longest = max(len(words_of(caption)) for _, captions in pool.values() for caption in captions)
        text = TextEncoder(vocabulary(), fill=16 * math.ceil(longest / 16))       # as in chapter 5
        model, self.said = build(name, GRID, sizes, seed)
        if name == "ours":              # `build` draws what should start at zero; the recipe wants it at zero
            model.dit = type(model.dit)(**model.dit.config)
        self.model = Denoiser(text, model.dit if name == "ours" else AsDiT(model)).to(device).train()
        self.blocks, self.count = model.blocks, parameters(model)
        self.opts = (optimizers(self.model, lr, 10 * lr) if name == "ours" else
                     [torch.optim.AdamW(self.model.parameters(), lr=lr, betas=(0.9, 0.999), fused=True)])
        self.base = [[g["lr"] for g in o.param_groups] for o in self.opts]
        self.params = list(self.model.parameters())
        self.average = [p.detach().clone() for p in self.params]
        self.seed, self.steps, self.seconds, self.curve = seed, 0, 0.0, []
        if clock is None:
            return
        self.limit = 60 * minutes
        course = lambda total: sum(clock[self.kind(step, total)] for step in range(total))
        self.total = max(1, round(self.limit / course(1200) * 1200))       # the course is the same at any length
        self.plan = dict(name=name, lr=lr, seed=seed, minutes=minutes, batch=batch, prompts=prompts, looks=looks, sizes=sizes,
                         clips={kind: len(latents) for kind, (latents, _) in pool.items()}, vae=whose, clock=clock)
        self.path, self.record = folder / f"{name}-{lr:g}-{minutes:g}min-{seed}.pt", folder / "record.json"
        if self.path.is_file():
            self.resume()

    def seconds_to(self, looks: int) -> float:
        """Seconds on the clock until so many looks have been taken."""
        steps = math.ceil(self.total * looks / self.looks)
        return sum(self.clock[self.kind(step, self.total)] for step in range(steps)) if looks < self.looks else self.limit

    def resume(self) -> None:
        """Go on from what was written; ValueError if it belongs to another plan."""
        state = load_checkpoint(self.path, self.device)
        planned(self.path, state["plan"], self.plan)
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        for o, saved in zip(self.opts, state["opts"]):
            o.load_state_dict(saved)
        self.steps, self.seconds, self.curve = state["steps"], state["seconds"], state["curve"]

    def save(self) -> None:
        buffer = io.BytesIO()
        torch.save(dict(plan=self.plan, model=self.model.state_dict(), average=self.average, steps=self.steps,
                        opts=[o.state_dict() for o in self.opts], seconds=self.seconds, curve=self.curve), buffer)
        write_atomically(self.path, lambda p: p.write_bytes(buffer.getbuffer()))

    def recall(self, looks: int) -> None:
        """Take the curve from the record if it has so many looks there, from here or from elsewhere: nothing but the curve is
        needed of a training that is over. ValueError if it belongs to another plan."""
        kept = json.loads(self.record.read_text())["trainings"].get(self.path.stem)
        if kept and len(kept["curve"]) >= looks > len(self.curve):
            planned(f"{self.path.stem} in {self.record}", kept["plan"], self.plan)
            self.steps, self.seconds, self.curve = kept["steps"], kept["seconds"], kept["curve"]

    def kind(self, step: int, total: int) -> str:
        """What a step of a training of `total` steps is made of. Ours: chapter 5's course, images for a fifth, beginnings of
        clips for two fifths, then clips, and images again every twelfth step. The plain recipe: clips."""
        if self.name != "ours":
            return "clips"
        if step < 0.2 * total or step % 12 == 11:
            return "images"
        return "beginnings" if step < 0.6 * total else "clips"

    def draw(self, kind: str, generator: torch.Generator) -> tuple[list[Tensor], list[str]]:
        """A batch of one kind; images and beginnings are as many as cost about the same."""
        latents, captions = self.pool["images" if kind == "images" else "clips"]
        size = round(self.batch * dict(images=5, beginnings=2.5, clips=1)[kind])
        index = torch.randint(len(latents), (size,), generator=generator)
        return list(latents[index, :, :2 if kind == "beginnings" else None].float().to(self.device)), [
            captions[i] for i in index.tolist()]

    def loss(self, data: tuple[list[Tensor], list[str]], generator: torch.Generator) -> Tensor:
        """The recipe's."""
        return (flow_loss(self.model, data, generator)[0] if self.name == "ours"
                else plain_loss(self.model, data, generator))

    def step(self, kind: str, share: float) -> None:
        """One training step, at a share of the whole training."""
        generator = generator_of(self.seed, self.steps)
        for o, lrs in zip(self.opts, self.base):
            for group, lr in zip(o.param_groups, lrs):
                group["lr"] = lr * rate(min(999, int(1000 * share)), 1000, warmup=20, decay=0.5)
        data = self.draw(kind, generator)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.loss(data, generator)
        if not math.isfinite(float(loss.detach())):
            raise FloatingPointError(f"{self.name}, learning rate {self.lr:g}: the loss is {float(loss.detach())}")
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        for o in self.opts:
            o.step()
            o.zero_grad(set_to_none=True)
        torch._foreach_lerp_(self.average, [p.detach() for p in self.params], 1 - min(0.99, (1 + self.steps) / (10 + self.steps)))
        self.steps += 1

    def look(self) -> None:
        """Judge the averaged weights on held-out prompts."""
        with averaged(self.model, self.params, self.average):
            pipe = SoraLite(self.vae, self.model.text, self.model.dit)
            read = score_at(pipe, *PIXELS, self.prompts, real=False, batch=32)[0]["sampled"].double().mean(0)
            self.model.train()
        self.curve.append((self.seconds / 60, float(read[-1]), float(read[:-1].mean())))

    def __call__(self) -> float:
        had, next_look = 0.0, math.ceil(self.total * (len(self.curve) + 1) / self.looks)
        while had < 60 and self.steps < next_look:
            kind = self.kind(self.steps, self.total)
            self.step(kind, self.steps / self.total)
            had += self.clock[kind]
        self.seconds += had
        if self.steps >= next_look:
            self.look()
            if self.steps >= self.total:
                had, self.seconds = had + self.limit - self.seconds, self.limit      # less than a step
            whole = json.loads(self.record.read_text())
            whole["trainings"][self.path.stem] = dict(plan=self.plan, steps=self.steps, seconds=self.seconds, curve=self.curve)
            write_atomically(self.record, lambda p: p.write_text(json.dumps(whole, indent=1) + "\n"))
        self.save()
        return had


def planned(what: object, kept: dict, plan: dict) -> None:
    """ValueError if what was kept belongs to another plan."""
    if kept != plan:
        raise ValueError(f"{what} belongs to another run ({kept}, now {plan}): delete it, or give another folder with --out")


def clocks(make, folder: Path, device: torch.device, seconds: float, eager: bool, plan: dict) -> dict:
    """The record {plan, machine, clock, trainings}. Its clock: seconds of a step of each contender and kind of batch, with
    their spread, of interleaved rounds, measured once and kept. ValueError if what was kept belongs to another plan."""
    path = folder / "record.json"
    if not path.is_file():
        host = harness.machine(device)
        harness.greet(host, device)
        arms = {name: make(name, lrs[0], 0) for name, lrs in RATES.items()}
        with ExitStack() as stack:
            for arm in arms.values() if not eager else []:
                stack.enter_context(compiled(arm.blocks, device))
            works = {(name, kind): partial(arm.step, kind, 0.5) for name, arm in arms.items() for kind in Recipe.KINDS[name]}
            times, _ = interleaved(works, seconds=seconds, device=device, most=10_000, desc="the clock")
        torch.compiler.reset()
        found = {name: {kind: spread(times[name, kind]) for kind in Recipe.KINDS[name]} for name in arms}
        record = dict(plan=plan, machine=host, clock=found, trainings={})
        write_atomically(path, lambda p: p.write_text(json.dumps(record, indent=1) + "\n"))
    record = json.loads(path.read_text())
    planned(path, record["plan"], plan)
    print(f"by the clock of {record['machine']['when']}, {record['machine']['device']}")
    return record


def minutes_to(curve: list, mark: float) -> float | None:
    """Minutes at which a curve of (minutes, fidelity, ...) first reaches a mark, by a straight line from the look before;
    None if it never does."""
    before = (0.0, 0.0)
    for at, value, *_ in curve:
        if value >= mark:
            return before[0] + (at - before[0]) * (mark - before[1]) / (value - before[1])
        before = at, value
    return None


def best_rate(arms: list[Recipe], looks: int) -> float:
    """The learning rate with most attributes right after so many looks (whole prompts are too rare early on to tell learning
    rates apart)."""
    return max((arm.curve[looks - 1][2], arm.lr) for arm in arms)[1]


def at_edge(rate: float, tried: tuple[float, ...]) -> str:
    """What a reader should know of a learning rate with none tried on one side of it."""
    return {min(tried): " (the smallest tried)", max(tried): " (the largest tried)"}.get(rate, "") if len(tried) > 1 else ""


def report(runs: dict[str, list[Recipe]], sweep: dict[str, list[Recipe]], swept: int, equals: list[str]) -> dict:
    """Tables and verdicts. Where the plain recipe never reaches a mark, its whole time counts, and the row says so. swept: how
    many looks the sweep had."""
    def row(arm: Recipe) -> dict:
        at = {mark: minutes_to(arm.curve, mark) for mark in MARKS}
        return {"recipe": arm.name, "seed": arm.seed, "learning rate": arm.lr, "steps": arm.steps,
                **{f"minutes to {mark:.0%}": f"not in {arm.limit / 60:g}" if at[mark] is None else at[mark] for mark in MARKS},
                "best fidelity": max(value for _, value, _ in arm.curve), "attributes right at the end": arm.curve[-1][2],
                "curve": arm.curve}

    rows = [row(arm) for arms in runs.values() for arm in arms]
    begun = [{"recipe": arm.name, "learning rate": arm.lr, **dict(zip(("minutes", "fidelity", "attributes right"),
                                                                      arm.curve[swept - 1]))}
             for arms in sweep.values() for arm in arms]
    verdicts = []
    for mark in MARKS:
        pairs = [(minutes_to(a.curve, mark), minutes_to(b.curve, mark)) for a, b in zip(runs["ours"], runs["Wan"])]
        late = sum(b is None for _, b in pairs)
        if any(a is None for a, _ in pairs):
            verdicts.append(dict(what=f"{mark:.0%}", met=False, target=TARGET, measured=None, sentence=(
                f"{mark:.0%}: ours did not reach it in {runs['ours'][0].limit / 60:g} minutes under every seed, target "
                f"{TARGET:g}: MISSED")))
            continue
        verdicts.append(harness.verdict(f"minutes to {mark:.0%}, plain recipe over ours"
                                        + (f" (at least: {late} of {len(pairs)} plain never did)" if late else ""),
                                        spread((b or arm.limit / 60) / a for (a, b), arm in zip(pairs, runs["Wan"])), TARGET))
    columns = {"recipe": "", "seed": "d", "learning rate": ".0e", "steps": "d",
               **{f"minutes to {mark:.0%}": ".1f" for mark in MARKS}, "best fidelity": ".1%", "attributes right at the end": ".1%"}
    return dict(title="Minutes to prompt fidelity", equal=equals, verdicts=verdicts, tables=[
        dict(title="Under each seed", rows=rows, columns=columns),
        dict(title="The sweep of learning rates (seed 0)", rows=begun, columns={
            "recipe": "", "learning rate": ".0e", "minutes": ".1f", "fidelity": ".1%", "attributes right": ".1%"})], remarks=[])


def draw(rows: list[dict], path: Path) -> str:
    """The curve of every training of `rows`, as a picture at `path`; returns the lines that show it on the book's page."""
    import matplotlib.pyplot as plt
    from sora_lite.lab import COLORS

    fig, ax = plt.subplots(figsize=(6, 2.8))
    for name, label, color in (("ours", "ours", "blue"), ("Wan", "plain, Wan's transformer", "orange")):
        for i, row in enumerate(row for row in rows if row["recipe"] == name):
            minutes, share, _ = zip(*row["curve"])
            ax.plot((0, *minutes), (0, *share), "o-", ms=3.5, color=COLORS[color], label=None if i else label)
    for mark in MARKS:
        ax.axhline(mark, color="black", lw=0.8, ls=":")
    ax.set(xlabel="minutes of training", ylabel="prompts followed", ylim=(0, 1))
    ax.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 0.9, 1], ["0", "20%", "40%", "60%", "80%", "90%", "100%"])
    ax.legend(frameon=False)
    harness.save(fig, path)
    return (f"![Prompts followed after minutes of training](static/{path.name})\n\n*Held-out prompts that are followed in every "
            "word, by minutes of training: one line for each seed. Dotted: the two marks.*")


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--minutes", type=float, default=20,
                       help="of training steps; the plain recipe's seeds get three times as many")
    parse.add_argument("--clock", type=float, default=180, help="seconds for measuring the seconds of a step")
    parse.add_argument("--looks", type=int, default=6, help="how often in a training fidelity is judged")
    parse.add_argument("--prompts", type=int, default=128)
    parse.add_argument("--pool", type=int, default=12288, help="coded clips; images are twice as many")
    parse.add_argument("--batch", type=int, default=32)
    parse.add_argument("--seeds", type=int, default=3)
    parse.add_argument("--tiny", action="store_true", help="see that it runs")
    parse.add_argument("--eager", action="store_true", help="compile neither contender")
    parse.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parse.add_argument("--out", type=Path, default=ROOT / "runs" / "bench")
    parse.add_argument("--keep", action="store_true", help="write the result and the record into the book too")
    parse.add_argument("--go-on", action="store_true", help="by the clock and after the trainings of the book's record")
    args = parse.parse_args()
    sizes, rates = dict(conv_depth=5), RATES
    if args.tiny:
        args.minutes, args.clock, args.looks, args.prompts, args.pool, args.batch, args.seeds = 0.01, 0, 1, 2, 8, 2, 2
        sizes, rates = dict(width=64, depth=2, heads=4, conv_depth=1, conv_width=32), {k: v[:2] for k, v in RATES.items()}
        if args.keep:
            parse.error("--tiny measures nothing that should be kept: leave out --keep")
    if min(args.minutes, args.looks, args.prompts, args.pool, args.batch, args.seeds) <= 0:
        parse.error("minutes, looks, prompts, pool, batch and seeds must be above 0")
    device, folder = torch.device(args.device), args.out / "fidelity"
    folder.mkdir(parents=True, exist_ok=True)
    if args.go_on and not (folder / "record.json").is_file():
        if not KEPT.is_file():
            parse.error(f"there is no {KEPT} to go on from: leave out --go-on")
        write_atomically(folder / "record.json", lambda p: p.write_bytes(KEPT.read_bytes()))
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    keep_memory()
    coder = ROOT / "data" / "sora-lite" / "vae"
    vae, pool, whose = VideoVAE.from_pretrained(coder, device), {}, fingerprint(coder)[:12]
    seen = world_of("shapes", seed=0, pillar=0.1)           # its latents are divided as chapter 2 divides them now
    vae.measure_latents([seen.batch(16, torch.Generator().manual_seed(i))[0].to(device) for i in range(8)])
    for kind, frames, n in (("clips", PIXELS[0], args.pool), ("images", 1, 2 * args.pool)):
        path = folder / f"coded-{kind}-{n}-{whose}.pt"
        if not path.is_file():
            world = Shapes(frames=frames, objects=(1, 1), level="ordinary+descriptive")
            coded = encode_world(vae, world, n, 0, batch=32, desc=f"coding {kind}")
            write_atomically(path, lambda p: torch.save(coded, p))
        pool[kind] = torch.load(path, weights_only=True)

    common = dict(looks=args.looks, batch=args.batch, sizes=sizes, prompts=args.prompts, vae=vae, whose=whose, pool=pool,
                  folder=folder, device=device)
    record = clocks(partial(Recipe, minutes=args.minutes, **common), folder, device, args.clock, args.eager,
                    dict(batch=args.batch, sizes=sizes, eager=args.eager, device=device.type))
    ticks = record["clock"]
    clock = {name: {kind: found["median"] for kind, found in kinds.items()} for name, kinds in ticks.items()}
    make = lambda name, lr, seed, minutes=args.minutes: Recipe(name, lr, seed, minutes=minutes, clock=clock[name], **common)

    def train(arms: list[Recipe], stage: str, looks: int) -> None:
        for arm in arms:
            arm.recall(looks)
        label = {f"{arm.name} {arm.lr:g} {arm.seed}": arm for arm in arms if len(arm.curve) < looks}
        if not label:
            return
        with ExitStack() as stack:
            for arm in label.values() if not args.eager else []:
                stack.enter_context(compiled(arm.blocks, device))
            harness.in_turn(label, desc=stage,
                            seconds={k: arm.seconds_to(looks) - 1e-6 for k, arm in label.items()},
                            used={k: arm.seconds for k, arm in label.items()})
        if args.keep:
            write_atomically(KEPT, lambda p: p.write_bytes((folder / "record.json").read_bytes()))

    sweep = {name: [make(name, lr, 0) for lr in rates[name]] for name in rates}
    same = equal("parameters of the transformers", {name: arms[0].count for name, arms in sweep.items()}, TOLERANCE)
    first = max(1, args.looks // 3)
    train([arm for arms in sweep.values() for arm in arms], "sweep", first)
    lr = {name: best_rate(arms, first) for name, arms in sweep.items()}
    runs = {name: [make(name, lr[name], seed, times * args.minutes) for seed in range(args.seeds)]
            for name, times in (("ours", 1), ("Wan", TARGET))}        # ours under seed 0 goes on from the sweep
    for seed in range(args.seeds):              # one seed after the other: an evening that ends early has whole ones
        for name, arms in runs.items():
            train([arms[seed]], f"{name}, seed {seed}", args.looks)
    result = report(runs, sweep, first, [
        f"{same}, text encoder, autoencoder, clips, batch ({args.batch} clips; ours takes as much work in images and beginnings "
        f"of clips), autocast to bfloat16, compiled blocks ({'no' if args.eager else 'both'}), averaging of weights, schedule of "
        f"the learning rate over a training's minutes ({args.minutes:g}; {TARGET * args.minutes:g} for the plain recipe's seeds), "
        f"sampler, guidance, judge ({args.prompts} held-out prompts, {args.looks} looks), {len(rates['ours'])} learning rates "
        f"each, of which the best after {first} looks goes on"])
    result["remarks"] = [
        "What differs is the recipe. Ours: chapter 5's transformer, Muon, times spread and shifted, stratified, images and "
        "beginnings of clips first, a quarter with given tokens. Plain: Wan's transformer, AdamW, uniform times, whole clips.",
        "Learning rates taken: " + ", ".join(f"{name} {rate:g}{at_edge(rate, rates[name])}" for name, rate in lr.items()) + ".",
        "Minutes are steps times the seconds of a step, which were measured in turns before all trainings: " + "; ".join(
            f"{name} {kind} {harness.show(found)}" for name, kinds in ticks.items() for kind, found in kinds.items()) + "."]
    every = {arm.path: arm.seconds for arms in [*sweep.values(), *runs.values()] for arm in arms}
    result |= dict(row=3, tiny=args.tiny, machine=record["machine"], hours=round(sum(every.values()) / 3600, 3),
                   options={k: v for k, v in vars(args).items() if k != "out"})      # where it was run is nobody's business
    harness.keep(args.out, "row3", result)
    print("\n" + harness.markdown(result))
    if args.keep:
        result["picture"] = draw(result["tables"][0]["rows"], KEPT.parent / "static" / "fidelity.svg")
        harness.keep_in_book({"3": result})


if __name__ == "__main__":
    main()
