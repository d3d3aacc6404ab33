# SPDX-License-Identifier: Apache-2.0
"""The values whose bytes are frozen in `v1/`: one of every document that crosses the wire, every field set.

`python tests/golden/make_v1.py` writes what is missing and never overwrites: devices in the field hold these bytes.
A change of a document that alters them needs a new schema version and a new folder.
"""

from datetime import datetime, timezone
from pathlib import Path

from edgeopt_wire.document import to_bytes
from edgeopt_wire.enrolment import Confirm, Enrolled, EnrolRequest, Renewed, RenewRequest
from edgeopt_wire.index import PackageIndex
from edgeopt_wire.manifest import Compatible, FileEntry, Manifest, Provenance, Quality, Variant
from edgeopt_wire.measurement import Conditions, Measurement, Thermal, Timing
from edgeopt_wire.messages import (
    Ack, Desired, DesiredModel, Event, EventBatch, MetaReply, MetaRequest, Phase, Presence, Pull, PullRefused,
    Reported, ReportedModel, SignedTime,
)
from edgeopt_wire.tensor import Affine, TensorSpec

FOLDER = Path(__file__).parent / "v1"
AT = datetime(2026, 11, 23, 8, 15, tzinfo=timezone.utc)
LATER = datetime(2026, 12, 23, 8, 15, tzinfo=timezone.utc)
IMAGE = TensorSpec("image", (1, 3, 224, 224), "float32", "NCHW")
SCORES = TensorSpec("scores", (1, 1000), "float32")
IMAGE_INT8 = TensorSpec("args_0", (1, 224, 224, 3), "int8", "NHWC", Affine(0.0078125, -1))
COMPATIBLE = Compatible(("raspberry-pi-5", "generic-arm64"), ("aarch64",), 512, 30_000_000, {"kernel": "6.6"})
VARIANT = Variant(
    id="litert-int8-t4", runtime="litert", precision="int8", file="variants/int8.tflite", inputs=(IMAGE_INT8,),
    outputs=(SCORES,), golden="golden/outputs/int8", min_sqnr_db=20.5, threads=4, accelerator="cpu",
    minimum_runtime="1.2", options={"xnnpack": "on"},
    quality=Quality(500, 0.97, 24.25, "top1", 0.7512, 0.7481), notes=("two operators stay in floats",),
    extra={"from_the_future": {"nested": [1, 2.5, None, "ü"]}},
)
MANIFEST = Manifest(
    name="efficientnet-lite0", version="1.2", device="raspberry-pi-5", compatible=COMPATIBLE,
    signature_inputs=(IMAGE,), signature_outputs=(SCORES,), variants=(VARIANT,),
    files=(FileEntry("variants/int8.tflite", 4_940_112, "1f" * 32), FileEntry("labels.txt", 10_472, "2e" * 32)),
    golden_inputs="golden/inputs", baseline={"variant": "onnx-fp32", "top1": 0.7512},
    provenance=Provenance("3d" * 32, "4c" * 32, "5b" * 32, "6a" * 32, {"edgeopt": "0.1.0", "torch": "2.9.0"}),
    labels="labels.txt", preprocess={"resize": 256, "crop": 224, "mean": [0.5, 0.5, 0.5]},
    postprocess={"top": 5}, extra={"from_the_future": True},
)
MEASUREMENT = Measurement(
    package_sha256="7f" * 32, model="efficientnet-lite0", version="1.2", variant="litert-int8-t4", precision="int8",
    device_id="porch", device_class="raspberry-pi-5", agent_version="0.1.0", measured_at=AT,
    conditions=Conditions(
        "litert", "1.2.0", 4, 1, "cpu", "aarch64", "Cortex-A76", "Debian 12", "", "ondemand",
        Thermal(48.3, False, 2_400_000, 0.12), Thermal(61.75, True, 1_500_000, 3.9), "raspberry-pi-5",
        {"fan": "off"},
    ),
    timing=Timing.of(
        [20_000_000 + 10_007 * i for i in range(128)], warmup=9, load_ns=81_000_000, first_inference_ns=44_000_000
    ),
    golden_ok=True, golden_exact=False, golden_sqnr_db=52.125, peak_memory_bytes=61_000_000, stable=True,
    warnings=("the CPU was throttled",), error="", extra={"from_the_future": 1},
)
REQUEST = "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"
CERTIFICATE = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
VALUES = {
    "manifest": MANIFEST,
    "measurement": MEASUREMENT,
    "desired": Desired(
        "porch", 7, AT, LATER,
        (DesiredModel("efficientnet-lite0", "1.2", "models/efficientnet-lite0/1.2/raspberry-pi-5.json", "r1",
                      {"from_the_future": "x"}),),
        {"from_the_future": []},
    ),
    "reported": Reported(
        "porch", "raspberry-pi-5", "9c1d", 7, "0.1.0",
        (ReportedModel("efficientnet-lite0", Phase.TRIAL, "1.1", "8e" * 32, "litert-int8-t4", "1.2", "r1", "none"),),
        12_000_000_000, True, {"kernel": "6.6.20"}, {"from_the_future": {}},
    ),
    "presence": Presence("porch", True, "9c1d", "0.1.0"),
    "events": EventBatch(
        "porch",
        (Event(41, "phase", AT, {"model": "efficientnet-lite0", "phase": "staged"}),
         Event(42, "measurement", LATER, {"n": 128})),
        "outbox-1", 3,
    ),
    "ack": Ack("outbox-1", 42),
    "pull": Pull("9d" * 32, ((0, 16), (40, 1))),
    "pull-refused": PullRefused("9d" * 32, "this device has no rollout of it"),
    "meta-request": MetaRequest("17", "metadata/timestamp.json", 65_536),
    "meta-reply": MetaReply("17", True, 65_536, 65_538, "e30="),
    "time": SignedTime("0123456789abcdef" * 2, AT),
    "index": PackageIndex(
        "efficientnet-lite0", "1.2", "raspberry-pi-5", COMPATIBLE, 150_000, "ac" * 32, 65_536,
        ("bb" * 32, "cc" * 32, "dd" * 32), {"from_the_future": None},
    ),
    "enrol-request": EnrolRequest("eot-token", REQUEST, "porch", "raspberry-pi-5", "0.1.0", {"from_the_future": 1}),
    "device-enrolled": Enrolled(
        "default", "porch", "raspberry-pi-5", True, CERTIFICATE, CERTIFICATE, "e30=", "broker.example", 8883,
        {"from_the_future": 1},
    ),
    "renew-request": RenewRequest(CERTIFICATE, REQUEST, "AAAA", {"from_the_future": 1}),
    "renewed": Renewed(CERTIFICATE, CERTIFICATE, {"from_the_future": 1}),
    "renewal-confirm": Confirm(CERTIFICATE, "AAAA", {"from_the_future": 1}),
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, value in VALUES.items():
        path = FOLDER / f"{name}.json"
        if not path.exists():
            path.write_bytes(to_bytes(value))


if __name__ == "__main__":
    main()
