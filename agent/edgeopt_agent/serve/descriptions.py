# SPDX-License-Identifier: Apache-2.0
"""What the protocol's clients are told of a model: metadata, configuration, statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeopt_agent.serve.protocol import describe_tensor

if TYPE_CHECKING:
    from edgeopt_agent.serve.served import Served


def describe(served: Served) -> dict[str, Any]:
    """A model's metadata; what postprocess offers is listed behind the model's own outputs."""
    manifest, batch = served.loaded.manifest, served.serving.max_batch
    finished = [
        {"name": n, "datatype": d, "shape": list(shape)} for n, d, shape in served.processing.outputs()
    ]
    return {
        "name": manifest.name,
        "versions": [manifest.version],
        "platform": f"edgeopt_{served.loaded.variant.runtime}",
        "inputs": [describe_tensor(spec, batch) for spec in manifest.signature_inputs],
        "outputs": [describe_tensor(spec, batch) for spec in manifest.signature_outputs],
        "parameters": {
            "accepts": served.processing.kind_in,
            "postprocess": finished,
            "batching": {"max_rows": batch, "sizes": list(served.batch_sizes)},
        },
    }


def configuration(served: Served) -> dict[str, Any]:
    """How a model is served, in the words of the model configuration extension."""
    manifest, serving = served.loaded.manifest, served.serving

    def edges(specs: Any) -> list[dict[str, Any]]:
        listed = [describe_tensor(spec) for spec in specs]
        free = serving.max_batch > 1
        return [
            {"name": e["name"], "data_type": f"TYPE_{e['datatype']}", "dims": e["shape"][free:]}
            for e in listed
        ]

    found: dict[str, Any] = {
        "name": manifest.name,
        "platform": f"edgeopt_{served.loaded.variant.runtime}",
        "max_batch_size": serving.max_batch if serving.max_batch > 1 else 0,
        "input": edges(manifest.signature_inputs),
        "output": edges(manifest.signature_outputs),
        "instance_group": [{"count": serving.instances}],
        "response_cache": {"enable": serving.response_cache is not None},
    }
    if serving.max_batch > 1:
        found["dynamic_batching"] = {"max_queue_delay_microseconds": serving.max_delay_us}
        if served.batch_sizes:
            found["dynamic_batching"]["preferred_batch_size"] = list(served.batch_sizes)
    return found


def statistics(served: Served) -> dict[str, Any]:
    """Counters in the words of the statistics extension; times are sums in nanoseconds since the model was loaded."""
    counts, manifest = served.scheduler.counts, served.loaded.manifest
    caches = served.counts()
    hits = {"count": sum(cache["hits"] for cache in caches.values()), "ns": 0}
    misses = {"count": sum(cache["misses"] for cache in caches.values()), "ns": 0}
    entry = {
        "name": manifest.name,
        "version": manifest.version,
        "inference_count": counts.rows,
        "execution_count": counts.runs,
        "inference_stats": {
            "success": {"count": counts.runs, "ns": counts.run_ns},
            "queue": {"count": counts.runs, "ns": counts.queue_ns},
            "compute_infer": {"count": counts.runs, "ns": counts.run_ns},
            "cache_hit": hits,
            "cache_miss": misses,
        },
        "edgeopt": {
            "refused": counts.refused,
            "expired": counts.expired,
            "waiting": served.scheduler.waiting,
            "caches": caches,
        },
    }
    return {"model_stats": [entry]}
