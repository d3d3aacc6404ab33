# SPDX-License-Identifier: Apache-2.0
"""POST .../infer: a body to a call, an answer to bytes.

A body is an infer request, or the bare bytes of one file or text: then `Content-Type` says so (`image/...`, `text/plain`,
`application/octet-stream`) and the answer holds what the package's postprocess gives, or the model's outputs.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edgeopt_agent.serve.http1 import MAX_BODY_BYTES, MAX_JSON_BYTES
from edgeopt_agent.serve.models import Models
from edgeopt_agent.serve.protocol import InferRequest, OutputWish, read_request, write_answer
from edgeopt_agent.serve.refusals import NotFound, NotImplementedHere, Refused, TooLarge
from edgeopt_agent.serve.regions import Regions
from edgeopt_agent.serve.repeats import tensors_behind

if TYPE_CHECKING:
    import numpy as np

    from edgeopt_agent.serve.repeats import Asking
    from edgeopt_agent.serve.routes import Asked
    from edgeopt_agent.serve.served import Served

HEADER_LENGTH = "Inference-Header-Content-Length"
_BARE = ("image/", "text/plain", "application/octet-stream")
_WINDOW = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}


def infer(
    models: Models, name: str, version: str, asked: Asked, regions: Regions
) -> tuple[bytes, tuple[memoryview, ...], dict[str, str]]:
    """Answer an infer request: JSON, binary tensors, headers. Errors as in `Routes.answer`."""
    with models.hold(name) as served:
        manifest = served.loaded.manifest
        if version and version != manifest.version:
            raise NotFound(f"{name} serves version {manifest.version}, not {version[:100]!r}")
        request, call = _read(asked, served, regions)
        answer = served.answer(call)
    write = functools.partial(_write, regions, asked.owner) if asked.may_share else None
    words = asked.repeats.words(request, answer)
    if words is not None:
        return _said(words, tensors_behind(request, answer.outputs, write))
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
        write,
    )
    asked.repeats.keep_words(request, answer, content)
    return _said(content, binary)


def _said(
    content: bytes, binary: Sequence[memoryview]
) -> tuple[bytes, tuple[memoryview, ...], dict[str, str]]:
    if not binary:
        return content, (), {"Content-Type": "application/json"}
    return (
        content,
        tuple(binary),
        {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(content))},
    )


def _write(regions: Regions, owner: int, region: str, offset: int, part: memoryview) -> None:
    regions.write(region, offset, part, owner)


def split_of(headers: Mapping[str, str]) -> int | None:
    """Where the JSON of an infer request ends (-1: with the body); None for a bare file or text, or a compressed body.

    Raises:
        Refused: The header that says it is no number.
    """
    text = headers.get(HEADER_LENGTH.lower())
    if text is not None and not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise Refused(f"{HEADER_LENGTH} is a number, found {text[:40]!r}")
    is_bare = text is None and headers.get("content-type", "").lower().startswith(_BARE)
    if is_bare or "content-encoding" in headers:
        return None
    return -1 if text is None else int(text)


def _read(asked: Asked, served: Served, regions: Regions) -> Asking:
    split = asked.split
    if split is not None:
        raw, binary = asked.read_body(split)
        return _parsed(bytes(raw), binary, asked, served, regions)
    whole = _decoded(asked.read_body(0)[1], asked.headers)
    text = asked.headers.get(HEADER_LENGTH.lower())
    if text is None and asked.headers.get("content-type", "").lower().startswith(_BARE):
        wishes = tuple(OutputWish(name) for name, _, _ in served.processing.outputs())
        first = served.loaded.manifest.signature_inputs[0]
        return _asking(InferRequest({first.name: [bytes(whole)]}, wishes))
    end = len(whole) if text is None else int(text)
    if end > len(whole):
        raise Refused(f"{HEADER_LENGTH} {end}, the decoded body has {len(whole)} bytes")
    if end > MAX_JSON_BYTES:
        raise TooLarge(f"{end} bytes of JSON, at most {MAX_JSON_BYTES} are read; send tensors in binary")
    return _parsed(bytes(whole[:end]), whole[end:], asked, served, regions)


def _parsed(raw: bytes, binary: memoryview, asked: Asked, served: Served, regions: Regions) -> Asking:
    """Parse a request, or find it parsed: most clients send the same JSON again and again."""
    repeats, generation = asked.repeats, regions.generation
    known = repeats.find(raw, binary, served, generation)
    if known is not None:
        return known
    is_fixed = True

    def read(region: str, offset: int, size: int) -> memoryview:
        nonlocal is_fixed
        is_fixed = is_fixed and regions.is_mapped(region, asked.owner)
        return regions.read(region, offset, size, asked.owner)

    signature = served.loaded.manifest.signature_inputs
    request = read_request(raw, binary, signature, read if asked.may_share else None)
    asking = _asking(request)
    if is_fixed and request.is_view:
        repeats.keep(raw, binary, served, generation, asking)
    else:
        repeats.forget()
    return asking


def _asking(request: InferRequest) -> Asking:
    from edgeopt_agent.serve.served import Call

    call = Call(
        request.inputs,
        tuple(wish.name for wish in request.outputs),
        priority=request.priority,
        timeout_us=request.timeout_us,
        may_cache=request.may_cache,
        is_shared=request.is_shared,
    )
    return request, call


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
