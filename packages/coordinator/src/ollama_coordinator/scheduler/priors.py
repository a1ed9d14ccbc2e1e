"""What is believed of a model on an agent before anything was measured: the size decides."""

from enum import IntEnum

TYPICAL_BYTES = 4_900_000_000
"""An 8B model in 4 bits: the size at which the rates below are stated."""

PREFILL_TOKENS_PER_SECOND = 800.0
DECODE_BYTES_PER_SECOND = 150e9
LOAD_OVERHEAD_SECONDS = 1.0
LOAD_BYTES_PER_SECOND = 1.5e9
UNLOAD_SECONDS = 0.6
OUTPUT_TOKENS = 150.0
BATCH_FACTOR = 0.4

WITHOUT_GPU_PREFILL = 1 / 15
WITHOUT_GPU_DECODE = 1 / 5


class Quantity(IntEnum):
    """What is learned of a model on an agent."""

    PREFILL = 0
    DECODE = 1
    LOAD = 2


def prior(quantity: Quantity, size: int, *, has_gpu: bool = True) -> float:
    """Tokens per second read or written, or the seconds of a load, for weights of `size` bytes."""
    weight = max(size or TYPICAL_BYTES, 1)
    if quantity is Quantity.PREFILL:
        rate = PREFILL_TOKENS_PER_SECOND * TYPICAL_BYTES / weight
        return rate if has_gpu else rate * WITHOUT_GPU_PREFILL
    if quantity is Quantity.DECODE:
        rate = DECODE_BYTES_PER_SECOND / weight
        return rate if has_gpu else rate * WITHOUT_GPU_DECODE
    return LOAD_OVERHEAD_SECONDS + weight / LOAD_BYTES_PER_SECOND
