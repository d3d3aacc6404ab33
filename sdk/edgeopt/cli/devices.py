# SPDX-License-Identifier: Apache-2.0
"""`edgeopt devices`: which device classes can be built for, and what is known about each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgeopt.cli._output import emit, json_option

if TYPE_CHECKING:
    from rich.console import Console

    from edgeopt_profiles.profile import Accelerator, DeviceProfile, Target


def _ids(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:  # noqa: ARG001 - click's
    from edgeopt_profiles.profile import profile_ids

    return [name for name in profile_ids() if name.startswith(incomplete)]


@click.group("devices", invoke_without_command=True)
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List the device classes that a model can be built for."""
    if ctx.invoked_subcommand is not None:
        ctx.obj = as_json
        return
    from edgeopt_profiles.profile import load_profile, profile_ids

    profiles = [load_profile(name) for name in profile_ids()]
    document = {"schema": "edgeopt.devices/1", "devices": [_summary(profile) for profile in profiles]}
    emit(document, as_json, lambda console: _print_list(console, profiles))


@command.command("show")
@click.argument("device", shell_complete=_ids)
@json_option
@click.pass_context
def show(ctx: click.Context, device: str, as_json: bool) -> None:
    """Show what is known about DEVICE, and from where."""
    from edgeopt_profiles.profile import load_profile
    from edgeopt_wire.document import to_json

    profile = load_profile(device)
    document = {"schema": "edgeopt.device-profile/1", **to_json(profile)}
    emit(document, as_json or bool(ctx.obj), lambda console: _print_profile(console, profile))


def _summary(profile: DeviceProfile) -> dict[str, Any]:
    return {
        "id": profile.id,
        "title": profile.title,
        "family": profile.family,
        "architectures": list(profile.architectures),
        "accelerators": [accelerator.id for accelerator in profile.accelerators],
        "precisions": sorted({target.precision for target in profile.targets}),
        "modules": list(profile.modules),
    }


def _print_list(console: Console, profiles: list[DeviceProfile]) -> None:
    from rich.table import Table

    table = Table()
    for heading in ("device", "what it is", "runs"):
        table.add_column(heading, no_wrap=heading == "device")
    for profile in profiles:
        runs = dict.fromkeys(_target(target, with_threads=False) for target in profile.targets)
        table.add_row(profile.id, profile.title, ", ".join(runs) or "nothing yet: install edgeopt[onnx]")
    console.print(table)
    console.print(
        "`edgeopt devices show DEVICE` tells more; docs/devices.md says how to add one.", highlight=False
    )


def _print_profile(console: Console, profile: DeviceProfile) -> None:
    from rich.markup import escape
    from rich.table import Table

    cpu = profile.cpu
    cores = f", {cpu.cores} cores" if cpu.cores else ""
    clock = f", up to {cpu.max_mhz} MHz" if cpu.max_mhz else ""
    rows = [
        ("title", profile.title),
        ("architectures", ", ".join(profile.architectures)),
        ("CPU", f"{cpu.name}{cores}{clock}"),
        ("instructions", ", ".join(cpu.isa) or "unknown"),
        ("memory", f"{profile.memory_mib} MiB" if profile.memory_mib else "unknown"),
        (
            "sustained",
            f"{profile.memory_bandwidth_gbps} GB/s" if profile.memory_bandwidth_gbps else "unknown",
        ),
        *(("accelerator", _accelerator(entry)) for entry in profile.accelerators),
        *(("target", _target(target)) for target in profile.targets),
        *(("scheme", f"{name}: {_scheme(profile, name)}") for name in profile.schemes),
        *(
            ("power mode", f"{mode.name}{' (default)' if mode.is_default else ''}")
            for mode in profile.power_modes
        ),
        ("fits devices", ", ".join(profile.device_classes)),
    ]
    if profile.modules:
        rows.append(
            ("modules", f"{', '.join(profile.modules)}; figures are those of {profile.default_module}")
        )
    rows.extend(
        ("source", f"{source.what} - {source.where} ({source.confidence})") for source in profile.sources
    )
    table = Table(title=profile.id, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    previous = ""
    for name, text in rows:
        table.add_row("" if name == previous else name, escape(text))
        previous = name
    console.print(table)


def _accelerator(entry: Accelerator) -> str:
    memory = f", about {entry.on_chip_bytes / 1e6:g} MB on the chip" if entry.on_chip_bytes else ""
    return f"{entry.id}: {entry.title}{memory}. {entry.notes}".strip()


def _target(target: Target, *, with_threads: bool = True) -> str:
    where = "" if target.accelerator == "cpu" else f" on {target.accelerator}"
    asked = " (by recipe)" if target.optional or target.by_recipe else ""
    text = f"{target.runtime} {target.precision}{where}{asked}"
    if not with_threads:
        return text
    scheme = f", scheme {target.scheme}" if target.scheme else ""
    return f"{text}, threads {' or '.join(map(str, target.threads))}{scheme}"


def _scheme(profile: DeviceProfile, name: str) -> str:
    scheme = profile.schemes[name]
    grain = "channel" if scheme.per_channel else "tensor"
    kind = "symmetric" if scheme.symmetric_activations else "asymmetric"
    return (
        f"{scheme.weight_dtype} weights per {grain}, {kind} {scheme.activation_dtype} activations, "
        f"{scheme.io} inputs and outputs"
    )
