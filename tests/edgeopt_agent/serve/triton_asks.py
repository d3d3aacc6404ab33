# SPDX-License-Identifier: Apache-2.0
"""Run in an interpreter that has `tritonclient[http]`: asks the agent at argv[1] everything, prints one JSON object."""

import json
import sys

import numpy as np
import tritonclient.http as triton
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException


def refused(call: object, *args: object, **options: object) -> list[str]:
    try:
        call(*args, **options)  # type: ignore[operator]
    except InferenceServerException as error:
        return [str(error.status()), str(error.message())]
    return []


def main(url: str) -> None:
    client = triton.InferenceServerClient(url, concurrency=4)
    image = np.repeat(np.float32([1, 9, 5, 3]), 8).reshape(1, 2, 4, 4)
    found: dict[str, object] = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready("tiny"),
        "version_ready": client.is_model_ready("tiny", "1"),
        "other_ready": client.is_model_ready("other"),
        "server": client.get_server_metadata(),
        "model": client.get_model_metadata("tiny"),
        "config": client.get_model_config("tiny"),
        "index": client.get_model_repository_index(),
        "unload": refused(client.unload_model, "tiny"),
    }

    def ask(binary_in: bool, binary_out: bool, **options: object) -> list[float]:
        given = triton.InferInput("image", [1, 2, 4, 4], "FP32")
        given.set_data_from_numpy(image, binary_data=binary_in)
        wish = triton.InferRequestedOutput("scores", binary_data=binary_out)
        answer = client.infer("tiny", [given], outputs=[wish], **options)
        return [float(value) for value in answer.as_numpy("scores").reshape(-1)]

    found["answers"] = [ask(i, o) for i in (True, False) for o in (True, False)]
    found["compressed"] = [
        ask(True, True, request_compression_algorithm=name, response_compression_algorithm=name)
        for name in ("gzip", "deflate")
    ]
    found["with_all"] = ask(True, True, model_version="1", request_id="7", priority=1, timeout=5_000_000)
    given = triton.InferInput("image", [1, 2, 4, 4], "FP32")
    given.set_data_from_numpy(image)
    found["no_outputs_named"] = client.infer("tiny", [given]).as_numpy("scores").reshape(-1).tolist()
    classes = triton.InferRequestedOutput("scores", class_count=2)
    answer = client.infer("tiny", [given], outputs=[classes]).as_numpy("scores")
    found["classes"] = [bytes(item).decode() for item in answer.reshape(-1)]
    pending = [client.async_infer("tiny", [given]) for _ in range(8)]
    found["async"] = [p.get_result().as_numpy("scores").reshape(-1).tolist() for p in pending]
    found["errors"] = {
        "model": refused(client.infer, "none", [given]),
        "version": refused(client.infer, "tiny", [given], model_version="9"),
        "sequence": refused(client.infer, "tiny", [given], sequence_id=5, sequence_start=True),
        "output": refused(client.infer, "tiny", [given], outputs=[triton.InferRequestedOutput("none")]),
    }
    found["shared"] = shared(client, image)
    found["statistics"] = client.get_inference_statistics("tiny")
    print(json.dumps(found))


def shared(client: triton.InferenceServerClient, image: np.ndarray) -> dict[str, object]:
    names = [f"edgeopt_{kind}_{client._parsed_url.port}" for kind in ("in", "out")]
    regions = [
        shm.create_shared_memory_region(n, n, size) for n, size in zip(names, (image.nbytes, 16), strict=True)
    ]
    try:
        shm.set_shared_memory_region(regions[0], [image])
        client.register_system_shared_memory(names[0], names[0], image.nbytes)
        client.register_system_shared_memory(names[1], names[1], 16)
        found: dict[str, object] = {"status": client.get_system_shared_memory_status()}
        given = triton.InferInput("image", [1, 2, 4, 4], "FP32")
        given.set_shared_memory(names[0], image.nbytes)
        wish = triton.InferRequestedOutput("scores")
        wish.set_shared_memory(names[1], 16)
        client.infer("tiny", [given], outputs=[wish])
        found["answer"] = shm.get_contents_as_numpy(regions[1], np.float32, [4]).tolist()
        given.set_shared_memory(names[0], image.nbytes, offset=64)
        found["beyond"] = refused(client.infer, "tiny", [given], outputs=[wish])
        found["twice"] = refused(client.register_system_shared_memory, names[0], names[0], 16)
        found["too_long"] = refused(client.register_system_shared_memory, "longer", names[0], 1 << 20)
        found["absent"] = refused(
            client.register_system_shared_memory, "absent", "edgeopt_nobody_made_this", 16
        )
        client.unregister_system_shared_memory()
        found["after"] = client.get_system_shared_memory_status()
        found["gone"] = refused(client.infer, "tiny", [given], outputs=[wish])
    finally:
        for region in regions:
            shm.destroy_shared_memory_region(region)
    return found


if __name__ == "__main__":
    main(sys.argv[1])
