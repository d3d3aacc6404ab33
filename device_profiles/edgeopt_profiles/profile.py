# SPDX-License-Identifier: Apache-2.0
"""DeviceProfile: what a device class is, which ways to run a model it takes, and in which number formats.

Rules:
- One TOML file a device, `data/<id>.toml`, checked against `data/profile.schema.json`; `host` is detected.
- What is not known is None, never 0 and never a guess; every figure has a source.
- Bandwidth is what a program sustains, not what the memory chips promise: a Raspberry Pi 4 sustains 43 % of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

from edgeopt_wire import seam
from edgeopt_wire.errors import RecipeError

HOST = "host"
FORMATS = ("onnx", "litert", "executorch")
PRECISIONS = ("fp32", "fp16", "bf16", "fp8-e4m3", "int8", "int8-dynamic", "int8-weights", "int4-weights")


@dataclass(frozen=True)
class Cpu:
    """The cores that a model runs on. `isa` names the extensions that matter for integers and half floats."""

    name: str
    cores: int | None
    isa: tuple[str, ...]
    max_mhz: int | None


@dataclass(frozen=True)
class Accelerator:
    """What a target can name as its `accelerator`; `on_chip_bytes` is its memory for parameters, where it has any."""

    id: str
    title: str
    on_chip_bytes: int | None = None
    notes: str = ""


@dataclass(frozen=True)
class Scheme:
    """A quantization: types of activations and weights, and what inputs and outputs of the file are (`io`).

    Weights are always symmetric; `per_channel` means a scale for each output channel. `symmetric_activations` fixes
    the zero point of activations, as TensorRT demands. `pair_safe` chooses weights whose products with uint8 cannot
    overflow the 16 bits in which x86 CPUs without VNNI add them in pairs. `zero_products` fixes the zero point of what
    transposed convolutions and products of two activations read, as OpenVINO needs for integers.
    """

    activation_dtype: str
    weight_dtype: str
    per_channel: bool
    symmetric_activations: bool
    io: str = "float32"
    pair_safe: bool = False
    zero_products: bool = False


@dataclass(frozen=True)
class Target:
    """One kind of file that the device takes, and the numbers of threads that are worth measuring.

    An `optional` one is made only where a recipe names its runtime: it needs libraries that not everybody has. One that
    is `by_recipe` is made only where a recipe names its precision.
    """

    runtime: str
    format: str
    precision: str
    threads: tuple[int, ...]
    accelerator: str = "cpu"
    scheme: str = ""
    optional: bool = False
    by_recipe: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(seam.unknown("format", self.format, FORMATS))
        if self.precision not in PRECISIONS:
            raise ValueError(seam.unknown("precision", self.precision, PRECISIONS))
        if (self.precision == "int8") != bool(self.scheme):
            raise ValueError(f"{self.runtime} {self.precision}: int8 needs a scheme and nothing else has one")
        if not self.threads or min(self.threads) < 1 or len(set(self.threads)) != len(self.threads):
            raise ValueError(
                f"{self.runtime} {self.precision}: threads must differ and be positive, found {self.threads}"
            )


@dataclass(frozen=True)
class PowerMode:
    """A setting of clocks and cores. A latency of one mode says nothing about another."""

    name: str
    is_default: bool
    cpu_cores: int | None = None
    cpu_max_mhz: float | None = None
    accelerator_max_mhz: float | None = None
    notes: str = ""


@dataclass(frozen=True)
class Source:
    """Where a fact comes from; confidence is `measured`, `vendor`, `derived`, `published` or `unverified`."""

    what: str
    where: str
    confidence: str


@dataclass(frozen=True)
class DeviceProfile:
    """A device class.

    `device_classes` are the classes whose devices may install a package built for this profile. A family, such as
    `jetson-orin`, has `modules`; its figures are those of its `default_module`.
    """

    id: str
    title: str
    family: str
    architectures: tuple[str, ...]
    cpu: Cpu
    memory_mib: int | None
    memory_bandwidth_gbps: float | None
    accelerators: tuple[Accelerator, ...]
    targets: tuple[Target, ...]
    schemes: Mapping[str, Scheme]
    device_classes: tuple[str, ...]
    modules: tuple[str, ...] = ()
    default_module: str = ""
    power_modes: tuple[PowerMode, ...] = ()
    sources: tuple[Source, ...] = ()

    def __post_init__(self) -> None:
        known = ("cpu", *(accelerator.id for accelerator in self.accelerators))
        for target in self.targets:
            if target.accelerator not in known:
                raise ValueError(
                    f"device {self.id}: {seam.unknown('accelerator', target.accelerator, known)}"
                )
            if target.scheme and target.scheme not in self.schemes:
                raise ValueError(f"device {self.id}: {seam.unknown('scheme', target.scheme, self.schemes)}")
        keys = [(target.runtime, target.precision, target.accelerator) for target in self.targets]
        if len(set(keys)) != len(keys):
            raise ValueError(
                f"device {self.id}: two targets share runtime, precision and accelerator: {keys}"
            )
        if self.id not in self.device_classes:
            raise ValueError(f"device {self.id}: its own packages must fit it; add it to device_classes")
        if bool(self.modules) != bool(self.default_module) or (
            self.default_module and self.default_module not in self.modules
        ):
            raise ValueError(f"device {self.id}: default_module must be one of modules {list(self.modules)}")

    @property
    def threads(self) -> tuple[int, ...]:
        """Every number of threads that some target runs with, ascending."""
        return tuple(sorted(set(chain.from_iterable(target.threads for target in self.targets))))


def profile_ids() -> tuple[str, ...]:
    """List the known device classes, `host` included, sorted."""
    from edgeopt_profiles.reader import ids

    return tuple(sorted((HOST, *ids())))


def load_profile(profile_id: str) -> DeviceProfile:
    """Return the profile called `profile_id`; `host` is this machine as it is found now.

    Raises:
        RecipeError: No profile has this name (the message lists the nearest and the known ones), or its file is wrong.
    """
    if profile_id == HOST:
        return host_profile()
    if profile_id not in profile_ids():
        raise RecipeError(seam.unknown("device", profile_id, profile_ids()))
    from edgeopt_profiles.reader import read

    return read(profile_id)


def host_profile() -> DeviceProfile:
    """Return this machine's profile: its CPU, memory and the runtimes that are installed."""
    from edgeopt_profiles.host import detect

    return detect()
