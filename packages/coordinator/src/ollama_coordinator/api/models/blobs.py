"""`/api/blobs/{digest}`: files uploaded for a model that is created next."""

import asyncio
import contextlib

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ollama_coordinator.api.http.errors import ClientLeft
from ollama_coordinator.operations import Blobs, TargetChooser, Uploads, digest_of

from .transfer import placement_of

SILENCE_SECONDS = 5.0


class Unread(Response):
    """200 at once, to a client that is still sending.

    What it sends on is thrown away: many clients read the answer only when they have sent all,
    and to close the connection under them would lose it.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, then listen until the client has finished, left or fallen silent."""
        headers = [(b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        with contextlib.suppress(TimeoutError):
            more = True
            while more:
                async with asyncio.timeout(SILENCE_SECONDS):
                    message = await receive()
                more = message["type"] == "http.request" and message.get("more_body", False)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class BlobsApi:
    """The handlers of uploads."""

    def __init__(self, uploads: Uploads, blobs: Blobs, targets: TargetChooser) -> None:
        self._uploads = uploads
        self._blobs = blobs
        self._targets = targets

    async def head(self, request: Request) -> Response:
        """`HEAD`: 200 if a model can be created from the file, else 404."""
        return Response(status_code=200 if await self._is_there(request) else 404)

    async def post(self, request: Request) -> Response:
        """`POST`: 201 for a new file; 200, unread, for one that nobody needs again."""
        if await self._is_there(request):
            return Unread()
        try:
            await self._uploads.take(request.path_params["digest"], request.stream())
        except ClientDisconnect as exc:
            raise ClientLeft from exc
        return Response(status_code=201)

    async def _is_there(self, request: Request) -> bool:
        """Whether the file waits here, or lies wherever a model would be created."""
        digest = digest_of(request.path_params["digest"])
        if self._uploads.size(digest) is not None:
            return True
        return await self._blobs.suffice(digest, placement_of(request, self._targets.default))
