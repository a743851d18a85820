"""Make the moving picture of the front page from the weights in data/: `python book/front.py`."""
from pathlib import Path

import torch
from einops import rearrange

from sora_lite.pipeline import SoraLite
from sora_lite.shapes import Shapes, caption
from sora_lite.video import write

ROOT = Path(__file__).resolve().parent.parent


def main(rows: int = 2, columns: int = 8, seed: int = 0) -> None:
    """Held-out prompts, one sample each, none chosen, on one sheet: a row with one figure, a row with two, and so on."""
    pipe = SoraLite.from_pretrained(ROOT / "data" / "sora-lite")
    worlds, generator = [Shapes(split="test", objects=(k, k)) for k in (1, 2)], torch.Generator().manual_seed(seed)
    casts = [worlds[row % 2] for row in range(rows)]
    scenes = [scene for world in casts for scene in world.scenes(world.cast(columns, generator))]
    videos = pipe([caption(s) for s in scenes], generator=generator)
    framed = torch.nn.functional.pad(videos, (2, 2, 2, 2), value=1.0)
    sheet = rearrange(framed, "(r k) c t h w -> c t (r h) (k w)", r=rows)
    print("\n".join(caption(s) for s in scenes))
    print(write(ROOT / "book" / "static" / "samples.gif", sheet, fps=8))


if __name__ == "__main__":
    main()
