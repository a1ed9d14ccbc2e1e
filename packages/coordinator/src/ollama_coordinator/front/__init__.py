"""A coordinator towards its clients where several share a database."""

from .front import Front

__all__ = ["Front"]
