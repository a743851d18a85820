"""Row 4: what batches of mixed clips cost, packed, in buckets and padded; and what sampling costs beside diffusers."""
import math
import time

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor, nn

from harness import TOLERANCE, equal, in_turn, interleaved, noise, parameters, ratio, spread, wait
from peers import BESIDE, CHANNELS, PATCH, PEERS, WORDS, Contender, Grid, build
from sora_lite.dit import DiT
from sora_lite.pipeline import BASE, Denoiser, SoraLite, flow_loss
from sora_lite.diffusion import guide, shift_for_tokens
from sora_lite.shapes import Shapes, vocabulary
from sora_lite.sizes import PaddedDiT, bucketed_batches, packed_batches, padded_batches
from sora_lite.text import TextEncoder
from sora_lite.train import optimizers
from sora_lite.vae import VideoVAE

# images and clips of 9, 17 and 33 frames in six sizes, as in chapter 7, as latents: 24 shapes, 15 to 324 tokens
STREAM = [(t, 2 * h, 2 * w) for t in (1, 3, 5, 9) for h, w in ((4, 4), (3, 5), (5, 3), (6, 6), (4, 7), (7, 4))]


class Stream:
    """One way to make batches of a stream, in training: a call does the next step and returns its seconds."""

    def __init__(self, kind: type[DiT], batches: list[list[int]], clips: list[Tensor], captions: list[str], device):
        torch.manual_seed(0)
        text = TextEncoder(vocabulary())
        self.model = Denoiser(text, kind(channels=4 * CHANNELS, words_width=text.width, conv_depth=0)).to(device).train()
        self.batches, self.clips, self.captions, self.device = batches, clips, captions, device
        self.optimizers, self.log = optimizers(self.model, 2e-3, 0.02), []

    def __call__(self) -> float:
        batch = self.batches[len(self.log) % len(self.batches)]
        some = [self.clips[i].to(self.device) for i in batch], [self.captions[i] for i in batch]
        wait(self.device)
        begun = time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16):
            loss, _ = flow_loss(self.model, some, torch.Generator().manual_seed(len(self.log)))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        wait(self.device)
        took = time.perf_counter() - begun
        self.log.append((sum(tokens_of(self.clips[i]) for i in batch), took))
        return took

    def rates(self, parts: int = 8) -> list[float]:
        """Real tokens a second in equal parts of the run; the first two steps warm up."""
        log = self.log[2:] if len(self.log) > parts + 2 else self.log
        cut = [log[len(log) * i // parts:len(log) * (i + 1) // parts] for i in range(parts)]
        return [sum(n for n, _ in part) / sum(s for _, s in part) for part in cut if part]


def tokens_of(latent: Tensor) -> int:
    """Tokens of latents `[Z, t, h, w]`."""
    return math.prod(n // p for n, p in zip(latent.shape[1:], PATCH))


def mixed(*, stream: int, capacity: int, seconds: float, device: torch.device) -> tuple[dict, list[str], list[str]]:
    """Real tokens a second of whole training steps. seconds: for each of the three."""
    pick = torch.randint(len(STREAM), (stream,), generator=torch.Generator().manual_seed(0)).tolist()
    clips = [noise((CHANNELS, *STREAM[k]), i, torch.device("cpu")) for i, k in enumerate(pick)]
    captions = Shapes(height=16, width=16, frames=1).batch(stream, torch.Generator().manual_seed(1))[1]
    grids = [tuple(n // p for n, p in zip(clip.shape[1:], PATCH)) for clip in clips]
    lengths = [math.prod(grid) for grid in grids]
    ways = {"packed": (DiT, packed_batches(lengths, capacity, torch.Generator().manual_seed(0))),
            "bucketed": (DiT, bucketed_batches(grids, capacity)),
            "padded": (PaddedDiT, padded_batches(lengths, max(1, round(capacity * stream / sum(lengths)))))}
    paid = {"packed": capacity * len(ways["packed"][1]), "bucketed": sum(lengths),
            "padded": sum(len(b) * max(lengths[i] for i in b) for b in ways["padded"][1])}
    arms = {name: Stream(kind, batches, clips, captions, device) for name, (kind, batches) in ways.items()}
    same = [equal("parameters", {name: parameters(arm.model) for name, arm in arms.items()}),
            f"stream ({stream} clips of {len(STREAM)} shapes, {min(lengths)} to {max(lengths)} tokens)",
            f"real tokens in a batch (about {capacity})", "loss, optimiser, precision (autocast to bfloat16)"]
    in_turn(arms, seconds=seconds, desc="packed, bucketed, padded")
    rates = {name: arm.rates() for name, arm in arms.items()}
    parts = min(map(len, rates.values()))
    rows = [{"batches": name, "steps a pass": len(ways[name][1]), "real of all tokens": sum(lengths) / paid[name],
             "real tokens/s": spread(rates[name]),
             "packed is faster": ratio(rates["packed"][:parts], rates[name][:parts])} for name in ways]
    columns = {"batches": "", "steps a pass": "d", "real of all tokens": ".1%", "real tokens/s": ",.0f",
               "packed is faster": ".2f"}
    return dict(title="Batches of mixed clips, training", columns=columns, rows=rows), same, [
        "diffusers' transformers take one shape a batch: of these three ways they can go by buckets alone."]


class Loop:
    """Prompts to latents with a diffusers transformer and diffusers' own scheduler, as diffusers' pipelines do it:
    words once, both branches of guidance in one call, the scheduler's step."""

    def __init__(self, text: TextEncoder, model: Contender, shift: float):
        self.text, self.model, self.shift = text, model.eval(), shift

    def words(self, prompts: list[str]) -> Tensor:
        """Features of the prompts, then of as many empty ones."""
        features, counts = self.text([*prompts, *[None] * len(prompts)])
        return nn.utils.rnn.pad_sequence(features.split(counts), batch_first=True)

    @torch.no_grad()
    def __call__(self, prompts: list[str], steps: int, scale: float, latents: Tensor) -> Tensor:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=self.shift)
        scheduler.set_timesteps(steps)
        with torch.autocast(latents.device.type, torch.bfloat16):
            words = self.words(prompts)
            for t in scheduler.timesteps:
                said = self.model(latents.repeat(2, 1, 1, 1, 1), (t / 1000).expand(len(words)).to(latents.device), words)
                latents = scheduler.step(guide(*said.chunk(2), scale), t, latents, return_dict=False)[0]
        return latents


class Whole(Loop):
    """Prompts to latents by one of diffusers' own pipelines, given the features of the words. Wan's asks for the two branches
    of guidance one after the other, CogVideoX's in one call."""
    kinds = {"Wan": WanPipeline, "CogVideoX": CogVideoXPipeline}

    def __init__(self, name: str, *loop):
        super().__init__(*loop)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=self.shift) if name == "Wan" else CogVideoXDDIMScheduler()
        self.pipe = self.kinds[name](tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=self.model.model)
        self.pipe.set_progress_bar_config(disable=True)
        self.turned = name == "CogVideoX"               # it wants latents with time before channels

    @torch.no_grad()
    def __call__(self, prompts: list[str], steps: int, scale: float, latents: Tensor) -> Tensor:
        _, _, t, h, w = latents.shape
        with torch.autocast(latents.device.type, torch.bfloat16):
            asked, nothing = self.words(prompts).chunk(2)
            return self.pipe(
                prompt_embeds=asked, negative_prompt_embeds=nothing, latents=latents.transpose(1, 2) if self.turned else latents,
                num_frames=4 * t - 3, height=8 * h, width=8 * w, num_inference_steps=steps, guidance_scale=scale,
                output_type="latent", return_dict=False)[0]


def sampling(title: str, sizes: dict, grid: Grid, *, clips: int, steps: int, seconds: float, device: torch.device,
             least: int = 3) -> tuple[dict, list[str]]:
    """Seconds a clip from prompt to latents, guidance and all, at equal steps and parameters."""
    torch.manual_seed(0)
    text, scale = TextEncoder(vocabulary()).to(device), 3.0
    prompts = Shapes(height=16, width=16, frames=1).batch(clips, torch.Generator().manual_seed(2))[1]
    if any(len(text.vocabulary.encode(p)) > WORDS for p in prompts):
        raise ValueError(f"a prompt has more than {WORDS} words: the contenders would not get equally many")
    start = noise((clips, CHANNELS, grid[0], 2 * grid[1], 2 * grid[2]), 5, device)
    models = {name: build(name, grid, sizes) for name in ("ours", *BESIDE)}
    count = {name: parameters(model) for name, (model, _) in models.items()}
    tokens, arms = noise((clips, math.prod(grid), 4 * CHANNELS), 5, device), {}
    for name in ("ours", "ours, plain"):
        pipe = SoraLite(VideoVAE(), text, models[name][0].dit).to(device)
        arms[f"{name}: multistep"] = lambda pipe=pipe: pipe.latents(
            prompts, grid, num_inference_steps=steps, guidance_scale=scale, early_guidance=1.0, noise=tokens)
    for name in PEERS:
        loop = Loop(text, models[name][0].to(device), shift_for_tokens(math.prod(grid), BASE))
        arms[f"{name}: Euler"] = lambda loop=loop: loop(prompts, steps, scale, start)
        if name in Whole.kinds:
            whole = Whole(name, text, models[name][0], loop.shift)
            arms[f"{name}: {Whole.kinds[name].__name__}"] = lambda whole=whole: whole(prompts, steps, scale, start)
    same = [equal("parameters", count, TOLERANCE),
            equal("numbers sampled", {name: arms[name]().numel() for name in arms}),
            f"steps ({steps}), shift of the schedule (but CogVideoX's pipeline has a schedule of its own), guidance ({scale:g}, "
            f"both branches in one call of the network, but by Wan's pipeline in two), prompts ({clips}), text "
            f"encoder, precision (autocast to bfloat16), nothing compiled"]
    times, _ = interleaved(arms, seconds=seconds, device=device, least=least, warm=1, desc=title)
    rows = [{"sampler": arm, "sizes": models[name := arm.split(":")[0]][1], "parameters": count[name],
             "seconds a clip": spread(s / clips for s in times[arm]),
             "ours is faster": ratio(times[arm], times["ours: multistep"]),
             "ours, plain, is faster": ratio(times[arm], times["ours, plain: multistep"])} for arm in arms]
    return dict(title=f"Sampling, {title}", rows=rows, columns={
        "sampler": "", "sizes": "", "parameters": "d", "seconds a clip": ".3g", "ours is faster": ".2f",
        "ours, plain, is faster": ".2f"}), same


def measure(*, stream: int, capacity: int, settings: list, clips: int, steps: int, seconds: float, device: torch.device,
            least: int = 3) -> dict:
    """Row 4: half of the `seconds` for batches of mixed clips, half for sampling."""
    table, same, remarks = mixed(stream=stream, capacity=capacity, seconds=seconds / 6, device=device)
    made = [sampling(title, sizes, grid, clips=clips, steps=steps, seconds=seconds / 2 / len(settings), device=device,
                     least=least) for title, sizes, grid in settings]
    return dict(title="Mixed batches, and sampling", tables=[table] + [t for t, _ in made],
                equal=[f"{table['title']}: " + ", ".join(same)] + [f"{t['title']}: " + ", ".join(s) for t, s in made],
                verdicts=[], remarks=remarks + [
                    "Euler is diffusers' FlowMatchEulerDiscreteScheduler, in one loop of ours; the pipelines are diffusers' own.",
                    "Ends at latents: no autoencoder is in these seconds. The contenders are not trained; how long a "
                    "network computes does not depend on what it has learned."])
