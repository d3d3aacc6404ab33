# SPDX-License-Identifier: Apache-2.0
"""POST .../infer: a body to a call, an answer to bytes.

A body is an infer request, or the bare bytes of one file or text: then `Content-Type` says so (`image/...`, `text/plain`,
`application/octet-stream`) and the answer holds what the package's postprocess gives, or the model's outputs.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgeopt_agent.serve.http1 import MAX_BODY_BYTES, MAX_JSON_BYTES
from edgeopt_agent.serve.models import Models
from edgeopt_agent.serve.refusals import NotFound, NotImplementedHere, Refused, TooLarge
from edgeopt_agent.serve.regions import Regions

if TYPE_CHECKING:
    import numpy as np

    from edgeopt_agent.serve.protocol import InferRequest
    from edgeopt_agent.serve.routes import Asked
    from edgeopt_agent.serve.served import Served

HEADER_LENGTH = "Inference-Header-Content-Length"
MEMO_BYTES = 4096
"""A request of up to this size is remembered by its connection."""

_BARE = ("image/", "text/plain", "application/octet-stream")
_WINDOW = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}


def infer(
    models: Models, name: str, version: str, asked: Asked, regions: Regions
) -> tuple[bytes, tuple[memoryview, ...], dict[str, str]]:
    """Answer an infer request: JSON, binary tensors, headers. Errors as in `Routes.answer`."""
    from edgeopt_agent.serve.protocol import write_answer
    from edgeopt_agent.serve.served import Call

    with models.hold(name) as served:
        manifest = served.loaded.manifest
        if version and version != manifest.version:
            raise NotFound(f"{name} serves version {manifest.version}, not {version[:100]!r}")
        request = _read(asked, served, regions)
        call = Call(
            request.inputs,
            tuple(wish.name for wish in request.outputs),
            priority=request.priority,
            timeout_us=request.timeout_us,
            may_cache=request.may_cache,
            is_shared=request.is_shared,
        )
        answer = served.answer(call)
    outputs = answer.outputs
    for wish in request.outputs:
        if wish.name not in outputs:
            raise NotFound(f"unknown output {wish.name!r}; the model gives {sorted(outputs)}")
        if wish.top:
            outputs[wish.name] = _classes(outputs[wish.name], wish.top, served)
    content, binary = write_answer(
        {"model_name": manifest.name, "model_version": manifest.version, "parameters": answer.parameters},
        outputs,
        request,
        (lambda region, offset, part: regions.write(region, offset, part, asked.owner))
        if asked.may_share
        else None,
    )
    if not binary:
        return content, (), {"Content-Type": "application/json"}
    return (
        content,
        tuple(binary),
        {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(content))},
    )


def _read(asked: Asked, served: Served, regions: Regions) -> InferRequest:
    from edgeopt_agent.serve.protocol import InferRequest, OutputWish

    text = asked.headers.get(HEADER_LENGTH.lower())
    kind = asked.headers.get("content-type", "").lower()
    signature = served.loaded.manifest.signature_inputs
    if text is None and kind.startswith(_BARE):
        _, content = asked.read_body(0)
        whole = _decoded(content, asked.headers)
        wishes = tuple(OutputWish(name) for name, _, _ in served.processing.outputs())
        return InferRequest({signature[0].name: [bytes(whole)]}, wishes)
    if text is not None and not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise Refused(f"{HEADER_LENGTH} is a number, found {text[:40]!r}")
    raw: bytes | bytearray
    if "content-encoding" in asked.headers:
        whole = _decoded(asked.read_body(0)[1], asked.headers)
        split = len(whole) if text is None else int(text)
        if split > len(whole):
            raise Refused(f"{HEADER_LENGTH} {split}, the decoded body has {len(whole)} bytes")
        if split > MAX_JSON_BYTES:
            raise TooLarge(
                f"{split} bytes of JSON, at most {MAX_JSON_BYTES} are read; send tensors in binary"
            )
        raw, binary = bytes(whole[:split]), whole[split:]
    else:
        raw, binary = asked.read_body(-1 if text is None else int(text))
    return _parsed(bytes(raw), binary, asked, served, regions)


def _parsed(raw: bytes, binary: memoryview, asked: Asked, served: Served, regions: Regions) -> InferRequest:
    """Parse a request, or find it parsed: a client with shared memory sends the same bytes again and again."""
    from edgeopt_agent.serve.protocol import read_request

    memo = asked.memo
    if not binary and raw == memo.raw and memo.served is served and memo.generation == regions.generation:
        assert memo.request is not None, "kept together with its bytes"
        return memo.request
    is_fixed = not binary and len(raw) <= MEMO_BYTES
    generation = regions.generation

    def read(region: str, offset: int, size: int) -> memoryview:
        nonlocal is_fixed
        is_fixed = is_fixed and regions.is_mapped(region, asked.owner)
        return regions.read(region, offset, size, asked.owner)

    signature = served.loaded.manifest.signature_inputs
    request = read_request(raw, binary, signature, read if asked.may_share else None)
    if is_fixed:
        memo.raw, memo.served, memo.generation, memo.request = raw, served, generation, request
    return request


def _decoded(content: memoryview, headers: Mapping[str, str]) -> memoryview:
    coding = headers.get("content-encoding", "identity").lower()
    if coding == "identity":
        return content
    if coding not in _WINDOW:
        raise NotImplementedHere(f"Content-Encoding {coding[:40]!r}; {' and '.join(_WINDOW)} are read")
    machine = zlib.decompressobj(_WINDOW[coding])
    try:
        found = machine.decompress(content, MAX_BODY_BYTES + 1)
    except zlib.error as error:
        raise Refused(f"the body is no {coding}: {error}") from error
    if len(found) > MAX_BODY_BYTES or machine.unconsumed_tail:
        raise TooLarge(f"the body is more than {MAX_BODY_BYTES} bytes when decoded")
    if not machine.eof:
        raise Refused(f"the {coding} body ends early")
    return memoryview(found)


def _classes(array: np.ndarray, top: int, served: Served) -> np.ndarray:
    """The classification extension's `score:index[:label]` texts, best first, one row a row of the batch."""
    import numpy as np

    from edgeopt_agent.answers import classify

    found = classify(array, top, served.processing.labels)
    score, index, label = (found[f"top_{part}"].reshape(-1) for part in ("score", "index", "label"))
    texts = np.empty(score.size, object)
    texts[:] = [
        f"{s:f}:{i}".encode() + (b":" + name if name else b"")
        for s, i, name in zip(score, index, label, strict=True)
    ]
    return texts.reshape(found["top_score"].shape)
