"""Row 2: our video autoencoder beside diffusers', for the same latents, trained on the same clips for as long.

Theirs work on all pixels with few channels, ours on blocks of 2 x 4 x 4 pixels with many. With as many parameters they
compute three times as much; so each comes in two scales, one with ours' parameters and one with ours' operations.
"""
import math
import time

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan
from torch import Tensor, nn

from harness import (TOLERANCE, equal, flops, in_turn, interleaved, parameters, ratio, show, spread, timed, verdict, wait)
from sora_lite.shapes import Shapes
from sora_lite.train import rate
from sora_lite.vae import CHANNELS_LAST, VideoVAE, psnr

COLUMNS = {"contender": "", "encode, frames/s": ".3g", "decode, frames/s": ".3g", "PSNR, dB": ".2f", "GFLOP a clip": ".3g",
           "of peak": ".0%", "steps": "d", "ms a step": ".3g", "parameters": "d", "sizes": ""}
CHANNELS = 24


class OurVAE(nn.Module):
    """Chapter 2's, which starts from the principal components of some clips."""
    said = "96 and 192 wide"

    def __init__(self):
        super().__init__()
        self.model = VideoVAE(channels=CHANNELS)

    def begin(self, videos: Tensor) -> None:
        self.model.start_from_pca(videos)

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        return self.model._encode(video.contiguous(memory_format=CHANNELS_LAST)).float().chunk(2, 1)

    def decode(self, z: Tensor) -> Tensor:
        return self.model._decode(z.contiguous(memory_format=CHANNELS_LAST)).float()


class PeerVAE(nn.Module):
    """One of diffusers', through its own `encode` and `decode`."""

    def begin(self, videos: Tensor) -> None:
        """Starts as its class starts it."""

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        latent = self.model.encode(video, return_dict=False)[0]
        return latent.mean.float(), latent.logvar.float()

    def decode(self, z: Tensor) -> Tensor:
        return self.model.decode(z, return_dict=False)[0].float()


class CogVideoXVAE(PeerVAE):
    """Widths in multiples of 8: with others, some machines' convolutions in bfloat16 have gradients that are not finite.
    One block a stage where 3 are released, since those would compute more than ours at any such width."""
    scales = {"parameters": ((8, 16, 32, 64), 1), "operations": ((8, 8, 16, 16), 1)}

    def __init__(self, widths: tuple[int, ...], layers: int):
        super().__init__()
        self.model = AutoencoderKLCogVideoX(block_out_channels=widths, norm_num_groups=4, layers_per_block=layers,
                                            latent_channels=CHANNELS, scaling_factor=1.0)
        self.said = f"{', '.join(map(str, widths))} wide, {layers} deep"


class WanVAE(PeerVAE):
    """Widths in multiples of 8, near the released 1 : 2 : 4 : 4 with 2 blocks a stage where the size allows it."""
    scales = {"parameters": (8, (1, 2, 4, 7)), "operations": (8, (1, 1, 3, 4), 1)}

    def __init__(self, base: int, times: tuple[int, ...], layers: int = 2):
        super().__init__()
        self.model = AutoencoderKLWan(base_dim=base, z_dim=CHANNELS, dim_mult=list(times), num_res_blocks=layers,
                                      temperal_downsample=[False, True, True])
        self.said = f"{', '.join(str(base * k) for k in times)} wide, {layers} deep"


PEERS = {"CogVideoX": CogVideoXVAE, "Wan": WanVAE}


@torch.no_grad()
def operations(model: nn.Module, device: torch.device, frames: int = 17, side: int = 64) -> int:
    """Operations of coding one clip and decoding it."""
    clip = torch.zeros(1, 3, frames, side, side, device=device)
    return flops(lambda: model.decode(model.encode(clip)[0]))


def loss_of(model: nn.Module, video: Tensor, generator: torch.Generator) -> Tensor:
    """Chapter 2's: squared error of the pixels, and 1e-5 of the latents' distance from a normal distribution."""
    mean, logvar = model.encode(video)
    logvar = logvar.clamp(-12, 4)
    z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator).to(mean.device)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
    return F.mse_loss(model.decode(z), video) + 1e-5 * kl.sum(1).mean()


class Training:
    """A contender in training: a call does one step on the batch of that number, and returns its seconds."""

    def __init__(self, model: nn.Module, lr: float, seconds: float, batch: int, device: torch.device):
        self.model, self.lr, self.limit, self.batch, self.device = model.train(), lr, seconds, batch, device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.steps, self.seconds, self.world = 0, 0.0, Shapes(objects=(1, 2), pillar=0.1)

    def __call__(self) -> float:
        generator = torch.Generator().manual_seed(self.steps)
        video = self.world.batch(self.batch, generator)[0].to(self.device)     # the clock does not run for the clips
        wait(self.device)
        begun = time.perf_counter()
        for group in self.optimizer.param_groups:       # warms up and falls with the time used, not with steps
            group["lr"] = self.lr * rate(min(999, int(1000 * self.seconds / self.limit)), 1000, decay=0.5)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = loss_of(self.model, video, generator)
        if not math.isfinite(float(loss.detach())):
            raise FloatingPointError(f"{type(self.model).__name__}: the loss is {float(loss.detach())} at step {self.steps}")
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, error_if_nonfinite=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        wait(self.device)
        took = time.perf_counter() - begun
        self.steps, self.seconds = self.steps + 1, self.seconds + took
        return took


def fastest_layout(model: nn.Module, video: Tensor, device: torch.device) -> str:
    """Put a peer's weights into the memory layout that trains it faster, by trial."""
    def trial() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss_of(model, video, torch.Generator().manual_seed(0)).backward()
        model.zero_grad(set_to_none=True)

    took = {}
    for layout in (torch.contiguous_format, CHANNELS_LAST):
        for p in model.parameters():
            if p.ndim == 5:
                p.data = p.data.contiguous(memory_format=layout)
        trial()
        took[layout] = min(timed(trial, device) for _ in range(2))
    best = min(took, key=took.get)
    for p in model.parameters():
        if p.ndim == 5:
            p.data = p.data.contiguous(memory_format=best)
    return "channels last" if best == CHANNELS_LAST else "channels first"


def measure(*, minutes: float, batch: int, seconds: float, held_out: int, peak: float, device: torch.device,
            lr: float = 1e-3, least: int = 3, coded: int = 4) -> dict:
    """Row 2. minutes: of training for each contender; seconds: for timing; held_out: clips for the PSNR."""
    torch.manual_seed(0)
    made = {"ours": OurVAE()}
    for name, kind in PEERS.items():
        made |= {f"{name}, equal {what}": kind(*scale) for what, scale in kind.scales.items()}
    rivals = list(made)[1:]
    world = Shapes(objects=(1, 2), pillar=0.1)
    start = world.batch(96, torch.Generator().manual_seed(10_000))[0]
    clips = world.batch(coded, torch.Generator().manual_seed(10_001))[0].to(device)
    facts, layout = {}, {}
    for name, model in made.items():
        model.begin(start)
        model.to(device)
        layout[name] = "channels last" if name == "ours" else fastest_layout(model, clips[:2], device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            z = model.encode(clips)[0]
            facts[name] = dict(parameters=parameters(model), latents=tuple(z.shape[1:]), flops=operations(model, device),
                               pixels=tuple(model.decode(z).shape[1:]))
    fact = lambda key: {name: one[key] for name, one in facts.items()}
    like = {name: n for name, n in fact("parameters").items() if not name.endswith("operations")}
    works = {name: n for name, n in fact("flops").items() if not name.endswith("parameters")}
    same = [equal("parameters, or where the name says so", like, TOLERANCE), equal("operations of a clip", works, 2 * TOLERANCE),
            equal("shape of the latents", fact("latents")),
            equal("shape of the clips", fact("pixels"))]
    arms = {name: Training(model, lr, 60 * minutes, batch, device) for name, model in made.items()}
    in_turn(arms, seconds=60 * minutes, desc="autoencoders: training")

    exact, rows = Shapes(split="test").batch(held_out, torch.Generator().manual_seed(99))[0], []

    @torch.no_grad()
    def code(model: nn.Module, part: str, given: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return model.encode(given)[0] if part == "encode" else model.decode(given)

    coding = {}
    for name, model in made.items():
        model.eval()
        z = code(model, "encode", clips)
        coding[name, "encode"] = lambda model=model: code(model, "encode", clips)
        coding[name, "decode"] = lambda model=model, z=z: code(model, "decode", z)
    times, _ = interleaved(coding, seconds=seconds, device=device, least=least, desc="autoencoders: coding")
    frames, quality, verdicts = coded * clips.shape[2], {}, []
    for name, model in made.items():
        back = torch.cat([code(model, "decode", code(model, "encode", v.to(device))).cpu().clamp(-1, 1)
                          for v in exact.split(4)])
        quality[name] = psnr(back, exact).tolist()
        both = [a + b for a, b in zip(times[name, "encode"], times[name, "decode"])]
        rows.append({"contender": name, "sizes": f"{model.said}, {layout[name]}", "parameters": facts[name]["parameters"],
                     "GFLOP a clip": facts[name]["flops"] / 1e9, "steps": arms[name].steps,
                     "ms a step": 1000 * arms[name].seconds / arms[name].steps,
                     "encode, frames/s": spread(frames / s for s in times[name, "encode"]),
                     "decode, frames/s": spread(frames / s for s in times[name, "decode"]),
                     "of peak": coded * facts[name]["flops"] / 1e9 / spread(both)["median"] / peak,
                     "PSNR, dB": sum(quality[name]) / len(quality[name])})
    at = {row["contender"]: row for row in rows}
    for name in rivals:
        for part in ("encode", "decode"):
            faster = verdict(f"ours faster to {part} than {name}", ratio(times[name, part], times["ours", part]), 3.0)
            if not faster["met"]:
                faster["sentence"] += (
                    f" (ours at {at['ours']['of peak']:.0%} of the measured peak with {at['ours']['GFLOP a clip']:.3g} "
                                       f"GFLOP a clip, {name} at {at[name]['of peak']:.0%} with {at[name]['GFLOP a clip']:.3g})")
            verdicts.append(faster)
        gains = spread(a - b for a, b in zip(quality["ours"], quality[name]))
        met = at["ours"]["PSNR, dB"] >= at[name]["PSNR, dB"]
        verdicts.append(dict(what=f"PSNR above {name}", measured=gains, target=0.0, met=met, sentence=(
            f"PSNR of ours above that of {name}, clip by clip: {show(gains, '.2f')} dB, target 0: {'met' if met else 'MISSED'}")))
    return dict(title="Autoencoders: frames per second and fidelity", verdicts=verdicts, equal=[
        ", ".join(same), f"clips, in their order; training steps for {minutes:g} min each; batch ({batch}); loss (squared "
        f"error and 1e-5 KL); optimiser (AdamW, learning rate {lr:g}, falling with the time used); autocast to bfloat16",
        f"clips that are timed ({coded} of {clips.shape[2]} frames of {clips.shape[3]} x {clips.shape[4]}) and judged "
        f"({held_out} unseen)"],
        tables=[dict(columns=COLUMNS, rows=rows)],
        remarks=[f"Not equal: ours starts from principal components of some clips, off the clock, the peers as their classes "
                 f"start them. {minutes:g} min trains none of them out: the PSNR says who is ahead by then, not in the end. "
                 "diffusers' classes have perceptual and adversarial losses in their papers; none here can use them, and "
                 "none does."])
