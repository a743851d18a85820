"""Sora Lite: OpenAI's Sora in the small. The chapters of the book are the source of its modules."""
import os
from pathlib import Path

__version__ = "0.1.0"


def _tiles_are_hidden(cpuinfo: str) -> bool:
    """Whether a Linux machine's first processor announces AMX but not CPUID leaf 0x1D, which describes its tiles."""
    rows = dict(line.replace("\t", "").split(":", 1) for line in cpuinfo.split("\n\n")[0].splitlines() if ":" in line)
    return "amx_tile" in rows.get("flags", "").split() and int(rows.get("cpuid level", 0x1D)) < 0x1D


# Some virtual machines are like that. oneDNN then sets up tiles of no size, and the first product in bfloat16 ends
# the process with an illegal instruction. It must be told to do without AMX before that product.
_cpuinfo = Path("/proc/cpuinfo")
if _cpuinfo.is_file() and _tiles_are_hidden(_cpuinfo.read_text()):
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
