"""The policies that count instead of predicting, one small file each."""

from .cpu import choose as cpu
from .least_connections import choose as least_connections
from .loaded_first import choose as loaded_first
from .random import Random
from .round_robin import choose as round_robin

__all__ = ["Random", "cpu", "least_connections", "loaded_first", "round_robin"]
