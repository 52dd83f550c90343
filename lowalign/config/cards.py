"""Graphics cards by name: memory, bandwidth and speed, as their makers publish them."""

import difflib
import re
from typing import NamedTuple

from lowalign.errors import UserError


class Card(NamedTuple):
    """memory in GB (10^9 bytes), bandwidth in GB/s, bf16: dense matrix products with fp32 sums, in TFLOPS."""

    memory: int
    bandwidth: int
    bf16: float


# NVIDIA's architecture whitepapers and data sheets. GeForce cards sum in fp32 at half the rate of the headline figure.
CARDS = {
    "RTX 3060": Card(12, 360, 25.5),
    "RTX 3080": Card(10, 760, 59.5),
    "RTX 3090": Card(24, 936, 71.2),
    "RTX 4060 Ti": Card(16, 288, 44.1),
    "RTX 4070 Ti Super": Card(16, 672, 88.2),
    "RTX 4080": Card(16, 717, 97.5),
    "RTX 4090": Card(24, 1008, 165.2),
    "RTX 5060 Ti": Card(16, 448, 47.4),
    "RTX 5070 Ti": Card(16, 896, 87.9),
    "RTX 5080": Card(16, 960, 112.6),
    "RTX 5090": Card(32, 1792, 209.5),
    "RTX A5000": Card(24, 768, 111.1),
    "RTX A6000": Card(48, 768, 154.8),
    "RTX 6000 Ada": Card(48, 960, 364.2),
    "RTX PRO 6000": Card(96, 1792, 503.8),
    "A10": Card(24, 600, 125.0),
    "A10G": Card(24, 600, 70.0),
    "L4": Card(24, 300, 121.0),
    "L40S": Card(48, 864, 362.0),
    "A100 40GB": Card(40, 1555, 312.0),
    "A100 80GB": Card(80, 2039, 312.0),
    "H100 PCIe": Card(80, 2000, 756.0),
    "H100": Card(80, 3350, 989.0),
    "H200": Card(141, 4800, 989.0),
    "B200": Card(180, 8000, 2250.0),
}
GIB = 2**30
UNITS = {"gb": 10**9, "gib": GIB, "mb": 10**6, "mib": 2**20}


def card(name: str) -> tuple[str, Card]:
    """A card by its name, in any case -> its name in CARDS, and its figures. Raises UserError."""
    known = {key.casefold(): key for key in CARDS}
    key = known.get(name.casefold().removeprefix("nvidia ").removeprefix("geforce "))
    if key is None:
        near = difflib.get_close_matches(name, CARDS, n=1, cutoff=0.5)
        question = f"; did you mean {near[0]}?" if near else "."
        raise UserError(f'--card "{name}" is not in the table{question} The table has {", ".join(CARDS)}')
    return key, CARDS[key]


def memory(text: str, flag: str = "--vram") -> int:
    """ "24GB" (24 · 10^9 bytes) or "24GiB" (24 · 2^30) -> bytes. Raises UserError, which names the flag."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    unit = UNITS.get(match[2].lower()) if match else None
    if unit is None or not float(match[1]):
        raise UserError(f"{flag} {text}: expected a size such as 24GB or 22.5GiB")
    return int(float(match[1]) * unit)
