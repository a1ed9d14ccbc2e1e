"""Faults that people met with real versions, none of which the code or its other tests name.

Fleets of two to five machines, of which all but the last one are broken in the same way.
"""

import asyncio
from typing import Any

import pytest

from integration.test_faults import CHAT, asked, fleet, raw, says
from support.coordinator import running

TEXTS = [
    (500, "llama runner process has terminated: exit status 0xc000001d"),
    (500, "llama runner process has terminated: exit status 0xc0000005"),
    (500, "llama runner process has terminated: signal: aborted (core dumped) CUDA error"),
    (500, "llama runner process has terminated: GGML_ASSERT(tensor->op == GGML_OP_UNARY) failed"),
    (500, "llama runner process has terminated: error loading model: missing tensor 'output'"),
    (500, "error loading model: done_getting_tensors: wrong number of tensors; expected 255"),
    (500, "exception error loading model architecture: unknown model architecture: ''"),
    (500, "check_tensor_dims: tensor 'blk.0.ffn_norm.weight' not found"),
    (500, "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED"),
    (500, "CUDA error: out of memory"),
    (500, "ggml_vulkan: device lost on Vulkan0"),
    (500, "vk::Device::allocateMemory: ErrorOutOfDeviceMemory"),
    (500, "ggml_metal_graph_compute: command buffer 3 failed with status 5"),
    (500, "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"),
    (500, "rocBLAS error: Cannot read TensileLibrary.dat"),
    (500, "model failed to load, this may be due to resource limitations or an internal error"),
    (500, 'do load request: Post "http://127.0.0.1:38187/load": EOF'),
    (500, 'do load request: Post "http://127.0.0.1:11680/load": wsarecv: An existing connection'),
    (500, 'POST predict: Post "http://127.0.0.1:62622/completion": wsarecv: The remote host'),
    (500, "unexpectedly reached end of file"),
    (500, "Unable to load dynamic library: libext_server.so: cannot open shared object file"),
    (500, "unexpected server status: llm busy - no slots available"),
    (500, "no slots available after 10 retries"),
    (500, "llm server not responding"),
    (400, "unexpected server status: 1"),
    (400, "digest mismatch, expected sha256:06227ae0, got sha256:9b3e1649"),
    (503, "server busy, please try again.  maximum pending requests exceeded"),
    (503, "Server overloaded, please retry shortly (ref: aaa65c70)"),
    (403, "Access Denied"),
    (404, "404: no such tunnel"),
    (410, "this tunnel has moved"),
    (520, None), (522, None), (523, None), (525, None), (530, "error code: 1033"),
]  # fmt: skip

PAGES = {
    "HAProxy": raw(504, "<html><body><h1>504 Gateway Time-out</h1></body></html>"),
    "Cloudflare": raw(524, "<!DOCTYPE html><html><title>524: A timeout occurred</title></html>"),
    "captive portal": raw(200, "<!DOCTYPE html><html><title>Sign in</title></html>"),
    "nginx": raw(413, "<html><title>413 Request Entity Too Large</title></html>"),
}
FAULTS: dict[str, Any] = {
    **{f"{status} {text}": says(status, text) for status, text in TEXTS},
    **PAGES,
}


@pytest.mark.spec("PROXY-7")
@pytest.mark.spec("FLEET-18")
@pytest.mark.parametrize("fault", FAULTS)
async def test_what_one_machine_of_a_fleet_can_serve_is_served(fault: str) -> None:
    size = 2 + list(FAULTS).index(fault) % 4
    async with running() as coordinator, fleet(coordinator, size) as nodes:
        for node in nodes[:-1]:
            FAULTS[fault](node)
        for _ in range(3):
            answers = await asyncio.gather(*(coordinator.chat() for _ in range(2)))
            assert {status for status, _ in answers} == {200}
        async with coordinator.stream(CHAT[1]) as response:
            assert response.status == 200
            assert b"[DONE]" in await response.read()
        assert max(asked(node) for node in nodes[:-1]) <= 2


@pytest.mark.spec("PROXY-9")
@pytest.mark.parametrize(
    "text",
    [
        "unsupported image format",
        "registry.ollama.ai/library/deepseek-r1:latest does not support tools",
        "json: cannot unmarshal array into Go struct field Message.messages.content of type string",
    ],
)
async def test_what_strangers_ask_wrongly_is_asked_once(text: str) -> None:
    async with running() as coordinator, fleet(coordinator, 4) as nodes:
        for node in nodes:
            says(400, text)(node)
        assert await coordinator.chat() == (400, {"error": text})
        assert sum(map(asked, nodes)) == 1
