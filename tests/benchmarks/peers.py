"""diffusers' video transformers and ours, asked alike: latents, times and words in, velocity out."""
import math
from functools import cache

import torch
from diffusers import CogVideoXTransformer3DModel, LatteTransformer3DModel, WanTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn

from harness import TOLERANCE, parameters
from sora_lite.dit import DiT
from sora_lite.patches import patchify, unpatchify

CHANNELS, WORDS, WORDS_WIDTH, HEAD = 24, 16, 96, 16     # latent channels; words of a caption; channels of a head
PATCH = (1, 2, 2)
Grid = tuple[int, int, int]                             # tokens along t, h, w


class Contender(nn.Module):
    """latents `[B, Z, t, h, w]`, times `[B]` in [0, 1] (1 is noise), words `[B, W, width]` -> velocity like latents.

    step: widths that can be built are multiples of it; every: so are depths.
    """
    step, every = HEAD, 1

    @property
    def blocks(self) -> list[nn.Module]:
        """What is compiled, block by block; the first of them is watched."""
        raise NotImplementedError


class Ours(Contender):
    """Chapter 5's DiT; cutting into tokens and laying them out again belong to it."""

    def __init__(self, grid: Grid, **sizes):
        super().__init__()
        self.dit = DiT(channels=CHANNELS * math.prod(PATCH), words_width=WORDS_WIDTH, patch=PATCH, **sizes)
        self.grid, self.width = grid, self.dit.config["width"]

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.dit.blocks, *self.dit.stem, *self.dit.head]

    def forward(self, latents: Tensor, t: Tensor, words: Tensor) -> Tensor:
        tokens, coords = patchify(latents, PATCH)
        b, n = tokens.shape[:2]
        said = self.dit(tokens.flatten(0, 1), t.repeat_interleave(n), coords.repeat(b, 1), [n] * b,
                        (words.flatten(0, 1), [words.shape[1]] * b))
        return unpatchify(said.view(b, n, -1), self.grid, PATCH)


class Plain(Ours):
    """Ours without convolutions: what they take in parameters goes into its width."""
    family = "DiT"

    def __init__(self, grid: Grid, width: int, depth: int, extra: int):
        super().__init__(grid, width=width, depth=depth, heads=width // HEAD, mlp_ratio=extra / width, conv_depth=0)

    @staticmethod
    def extra(width: int) -> tuple[int, int]:
        """Hidden channels of the MLP: 1 to 3 times the width (chapter 5's have 2)."""
        return width, 3 * width


class Wan(Contender):
    """Wan 2.1: self-attention with rotary positions, cross-attention to the words, adaLN from one projection."""
    family = "WanTransformer3DModel"

    def __init__(self, grid: Grid, width: int, depth: int, extra: int):
        super().__init__()
        self.grid, self.width = grid, width
        self.model = WanTransformer3DModel(
            patch_size=PATCH, num_attention_heads=width // HEAD, attention_head_dim=HEAD, in_channels=CHANNELS,
            out_channels=CHANNELS, text_dim=WORDS_WIDTH, freq_dim=128, ffn_dim=extra, num_layers=depth,
            rope_max_seq_len=64)

    @staticmethod
    def extra(width: int) -> tuple[int, int]:
        """Hidden channels of the feed-forward net: 2 to 6 times the width (Wan's own models have 2.7 to 5.8)."""
        return 2 * width, 6 * width

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.blocks)

    def forward(self, latents: Tensor, t: Tensor, words: Tensor) -> Tensor:
        return self.model(latents, 1000 * t, words, return_dict=False)[0].float()


class CogVideoX(Contender):
    """CogVideoX: words and patches in one attention, each with modulations of its own; rotary positions, as in the 5B."""
    family = "CogVideoXTransformer3DModel"

    def __init__(self, grid: Grid, width: int, depth: int, extra: int):
        super().__init__()
        self.grid, self.width = grid, width
        self.model = CogVideoXTransformer3DModel(
            num_attention_heads=width // HEAD, attention_head_dim=HEAD, in_channels=CHANNELS, out_channels=CHANNELS,
            time_embed_dim=extra, text_embed_dim=WORDS_WIDTH, num_layers=depth, sample_width=2 * grid[2],
            sample_height=2 * grid[1], sample_frames=4 * grid[0] - 3, max_text_seq_length=WORDS,
            use_rotary_positional_embeddings=True)
        turn = get_3d_rotary_pos_embed(HEAD, ((0, 0), grid[1:]), grid[1:], grid[0])
        self.register_buffer("cos", turn[0], persistent=False)
        self.register_buffer("sin", turn[1], persistent=False)

    @staticmethod
    def extra(width: int) -> tuple[int, int]:
        """Channels of the features of the time: the 5B's are a sixth of its width; a small model needs a few more."""
        return 32, width

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.transformer_blocks)

    def forward(self, latents: Tensor, t: Tensor, words: Tensor) -> Tensor:
        said = self.model(latents.transpose(1, 2), words, 1000 * t, image_rotary_emb=(self.cos, self.sin),
                          return_dict=False)[0]
        return said.transpose(1, 2).float()


class Latte(Contender):
    """Latte: blocks over space and blocks over time in turn; a layer is one of each. Square frames only."""
    family, step, every = "LatteTransformer3DModel", 8, 2

    def __init__(self, grid: Grid, width: int, depth: int, extra: int = 0):
        super().__init__()
        self.grid, self.width = grid, width
        self.model = LatteTransformer3DModel(
            num_attention_heads=8, attention_head_dim=width // 8, in_channels=CHANNELS, out_channels=CHANNELS,
            num_layers=depth // 2, cross_attention_dim=width, attention_bias=True, sample_size=2 * grid[1],
            patch_size=PATCH[1], activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
            norm_type="ada_norm_single", norm_elementwise_affine=False, caption_channels=WORDS_WIDTH,
            video_length=grid[0])

    @staticmethod
    def extra(width: int) -> tuple[int, int]:
        """There is nothing to choose."""
        return 0, 0

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.model.transformer_blocks, *self.model.temporal_transformer_blocks]

    def forward(self, latents: Tensor, t: Tensor, words: Tensor) -> Tensor:
        return self.model(latents, 1000 * t, words, return_dict=False)[0].float()


PEERS = {"Wan": Wan, "CogVideoX": CogVideoX, "Latte": Latte}
BESIDE = {"ours, plain": Plain} | PEERS                 # all that stand beside chapter 5's, with as many parameters


def sized(kind: type[Contender], target: int, grid: Grid, depth: int = 4) -> tuple[int, int, int]:
    """The sizes (width, depth, extra) with which a contender has as many parameters as `target`, within 5%.

    As deep as ours if that can be, else the nearest depth; then a width that matrix units like (a multiple of 32),
    then the nearest number. Nothing is allocated. ValueError if there are no such sizes.
    """
    @cache
    def count(*sizes: int) -> int:
        with torch.device("meta"):
            return parameters(kind(grid, *sizes))

    for deep in sorted(range(2, 2 * depth + 1, kind.every), key=lambda d: abs(d - depth)):
        found = []
        for width in range(2 * kind.step, 513, kind.step):
            low, high = kind.extra(width)
            if count(width, deep, low) > target * (1 + TOLERANCE):
                break
            grown = count(width, deep, high) - count(width, deep, low)      # the count is linear in `extra`
            wish = low + (target - count(width, deep, low)) * (high - low) / grown if grown else low
            extra = min(high, max(low, 16 * round(wish / 16)))
            gap = abs(count(width, deep, extra) / target - 1)
            if gap <= TOLERANCE:
                found.append((width % 32 > 0, gap, (width, deep, extra)))
        if found:
            return min(found)[-1]
    raise ValueError(f"no sizes give {kind.family} {target:,} parameters within {TOLERANCE:.0%}")


def build(name: str, grid: Grid, ours: dict, seed: int = 0) -> tuple[Contender, str]:
    """A contender by name with ours' number of parameters, and its sizes in words. Last layers that start at zero are
    drawn: a network that says nothing would have no gradients to compute inside."""
    torch.manual_seed(seed)
    if name == "ours":
        model = Ours(grid, **ours)
        said = f"{model.width} wide, {model.dit.config['depth']} deep, {2 * model.dit.config['conv_depth']} convolutions"
    else:
        with torch.device("meta"):
            target, depth = parameters(Ours(grid, **ours)), Ours(grid, **ours).dit.config["depth"]
        width, deep, extra = sized(BESIDE[name], target, grid, depth)
        model = BESIDE[name](grid, width, deep, extra)
        said = f"{width} wide, {deep} deep" + (f", {'time' if name == 'CogVideoX' else 'feed-forward'} {extra}" if extra else "")
    for p in model.parameters():
        if p.ndim > 1 and not p.any():
            nn.init.normal_(p, std=0.02)
    return model, said


class AsDiT(nn.Module):
    """A contender with the interface of `DiT`, for the book's pipeline and losses: all clips of one size, one noise
    level a clip, words filled with zeros to the longest caption (as Wan's pipeline fills them)."""
    rim = ("model",)

    def __init__(self, model: Contender):
        super().__init__()
        self.model, self.config = model, dict(channels=CHANNELS * math.prod(PATCH))

    def forward(self, tokens: Tensor, t: Tensor, coords: Tensor, lengths: list[int], words) -> Tensor:
        n, (features, counts) = math.prod(self.model.grid), words
        if set(lengths) != {n}:
            raise ValueError(f"this contender was built for clips of {n} tokens, got {sorted(set(lengths))}")
        latents = unpatchify(tokens.view(len(lengths), n, -1), self.model.grid, PATCH)
        padded = nn.utils.rnn.pad_sequence(features.split(counts), batch_first=True)
        return patchify(self.model(latents, t.view(len(lengths), n)[:, 0], padded), PATCH)[0].flatten(0, 1)
