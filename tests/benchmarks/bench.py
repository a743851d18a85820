"""Beside peers: `python tests/benchmarks/bench.py` measures rows 1, 2, 4 and 5, in one process, in at most 20 minutes.

`--tiny` runs every row at a size at which numbers mean nothing, to see that it runs. `--keep` writes the result into
the book. Row 3 runs for hours and is fidelity.py.
"""
import os

# diffusers must ask nobody for anything, and no row needs the network
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
import argparse
import time
import warnings
from pathlib import Path

import sora_lite  # noqa: F401 -- first: on some machines it must tell oneDNN to do without AMX
import torch

import autoencoders
import batches
import growth
import harness
import step
from sora_lite.train import keep_memory

CONV = dict(conv_depth=5)                                        # chapter 5's sizes; 128 wide, 4 deep are the defaults
SHORT, LONG = (5, 4, 4), (3, 8, 8)                               # 80 tokens: 17 frames, 64 x 64; 192: 9 frames, 128 x 128
COMPARED = [("clips of 80 tokens", CONV, SHORT), ("clips of 192 tokens", CONV, LONG)]
SMALL = dict(width=64, depth=2, heads=4, conv_depth=1, conv_width=32)
SIZES = {
    "default": {
        1: dict(settings=COMPARED, batch=32, seconds=130),
        2: dict(minutes=1.0, batch=4, seconds=40, held_out=32),
        4: dict(stream=512, capacity=1024, settings=COMPARED[:1], clips=4, steps=20, seconds=100),
        5: dict(lengths=[2, 3, 5, 9, 17, 33, 49], sides=[2, 3, 4, 6, 8, 12], model=CONV, batch=4, counts=[1, 2], rounds=12,
                seconds=60)},
    "tiny": {
        1: dict(settings=[("small", SMALL, (2, 2, 2))], batch=2, seconds=0.1, least=1),
        2: dict(minutes=0.002, batch=1, seconds=0.1, held_out=2, least=1, coded=1),
        4: dict(stream=24, capacity=400, settings=[("small", SMALL, (2, 2, 2))], clips=2, steps=2, seconds=0.6, least=1),
        5: dict(lengths=[2, 3], sides=[2, 3], model=SMALL, batch=1, counts=[1, 2], rounds=3, seconds=0.1, least=1)},
}
MODULES = {1: step, 2: autoencoders, 4: batches, 5: growth}


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--rows", type=int, nargs="+", choices=list(MODULES), default=list(MODULES))
    parse.add_argument("--tiny", action="store_true", help="see that every row runs")
    parse.add_argument("--forms", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"],
                       help="row 1: how the models run; both by default, for ours and for diffusers'")
    parse.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parse.add_argument("--threads", type=int, help="of PyTorch; by default one for each core this process may use")
    parse.add_argument("--out", type=Path, default=harness.ROOT / "runs" / "bench")
    parse.add_argument("--keep", action="store_true", help="write the result into the book too")
    args = parse.parse_args()
    if args.keep and args.tiny:
        parse.error("--tiny measures nothing that should be kept: leave out --keep")
    device, begun = torch.device(args.device), time.time()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if args.threads or device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(args.threads or cores)
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")    # Wan's norms under autocast
    keep_memory()

    host = harness.machine(device)
    harness.greet(host, device)
    size = 512 if args.tiny else 2048
    peak = harness.peak(device, size=size)
    host |= dict(peak_gflops=round(peak, 1), peak_gflops_single=round(harness.peak(device, torch.float32, size), 1))
    print(f"peak of a matrix product: {peak:.0f} GFLOP/s in bfloat16, {host['peak_gflops_single']:.0f} in single precision\n")

    sizes = SIZES["tiny" if args.tiny else "default"]
    for number in args.rows:
        options = dict(sizes[number], device=device)
        if number in (1, 2, 5):
            options["peak"] = peak
        options |= {1: dict(forms=tuple(args.forms)), 5: dict(cores=cores)}.get(number, {})
        print(f"row {number}, {args.rows.index(number) + 1} of {len(args.rows)}; {(time.time() - begun) / 60:.0f} minutes so far",
              flush=True)
        started = time.time()
        result = MODULES[number].measure(**options)
        result |= dict(row=number, seconds=round(time.time() - started), tiny=args.tiny, machine=host,
                       options={k: str(v) if k == "device" else v for k, v in options.items()})
        harness.keep(args.out, f"row{number}", result)
        if args.keep:       # at once: a later row may fail
            harness.keep_in_book({str(number): result})
        print("\n" + harness.markdown(result), flush=True)
    print(f"{(time.time() - begun) / 60:.1f} minutes; results in {args.out}")


if __name__ == "__main__":
    main()
