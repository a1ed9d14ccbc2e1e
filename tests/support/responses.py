"""aioresponses for today's aiohttp; importing this module is enough."""

import inspect
from typing import Any
from unittest.mock import Mock

import aiohttp
import aioresponses.core


class Response(aiohttp.ClientResponse):
    """aiohttp 3.14 wants a `stream_writer`; aioresponses 0.7.9 passes none (its issue 289)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "stream_writer" in inspect.signature(aiohttp.ClientResponse.__init__).parameters:
            kwargs.setdefault("stream_writer", Mock(output_size=0))
        super().__init__(*args, **kwargs)


vars(aioresponses.core)["ClientResponse"] = Response
