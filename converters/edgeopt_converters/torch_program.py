# SPDX-License-Identifier: Apache-2.0
"""PyTorch's exported program: reading one, describing its edges, digesting it.

Rules:
- Tensors at the edges are counted flat, in the order of the program's signature, however nested its arguments are.
- Shapes become static: a free batch axis becomes 1, any other free axis is refused.
- A 4-axis float input is an image, NCHW as PyTorch's convolutions want it, unless the caller says otherwise.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeopt_converters.model import Model
from edgeopt_wire.errors import RecipeError, UnsupportedError
from edgeopt_wire.tensor import DTYPES, TensorSpec


def load_program(path: Path) -> Any:
    """Read what `torch.export.save` wrote.

    Raises:
        RecipeError: The file is something else, was written by an incompatible PyTorch, or has free axes other than
            the batch.
        UnsupportedError: PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise UnsupportedError("a .pt2 file needs PyTorch: pip install 'edgeopt[torch]'") from error
    _check_archive(path)
    try:
        program = torch.export.load(str(path))
    except Exception as error:  # whatever the deserializer raises, the file is the cause
        raise RecipeError(
            f"{path}: PyTorch {torch.__version__} cannot read this program: {error}. "
            "Save it again with torch.export.save and this PyTorch"
        ) from error
    return with_static_shapes(program)


def export_module(module: Any, inputs: Sequence[TensorSpec]) -> Any:
    """Export a module, or a graph module that was rewritten, for inputs of these shapes and types."""
    import torch

    examples = tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in inputs)
    with torch.no_grad():
        return torch.export.export(module, examples, strict=False)


def program_model(program: Any, *, name: str, layouts: Sequence[str] = ()) -> Model:
    """Describe a program as a Model. `layouts` names the axes of each input, "" where the default is right.

    Raises:
        RecipeError: More layouts than inputs, or a free axis other than the batch.
        UnsupportedError: A tensor has a type that no device takes (complex, bfloat16, ...).
    """
    program = with_static_shapes(program)
    values = _values(program)
    inputs, outputs = _edges(program)
    if len(layouts) > len(inputs):
        raise RecipeError(f"{len(layouts)} layouts are given for {len(inputs)} inputs: {', '.join(inputs)}")
    padded = [*layouts, *[""] * (len(inputs) - len(layouts))]
    return Model(
        format="torch",
        program=program,
        name=name,
        inputs=tuple(
            _spec(tensor, values[tensor], layout or _default_layout(values[tensor]))
            for tensor, layout in zip(inputs, padded, strict=True)
        ),
        outputs=tuple(_spec(label, values[tensor]) for label, tensor in _named_once(outputs)),
    )


def with_static_shapes(program: Any) -> Any:
    """Return the program itself if its shapes are static, else one with batch 1.

    Raises:
        RecipeError: An axis other than the first is free.
    """
    values = _values(program)
    inputs, _ = _edges(program)
    if all(isinstance(axis, int) for tensor in inputs for axis in values[tensor].shape):
        return program
    import torch
    from torch.utils import _pytree as pytree

    for tensor in inputs:
        for axis, size in enumerate(values[tensor].shape):
            if axis > 0 and not isinstance(size, int):
                raise RecipeError(
                    f"input {tensor!r}: axis {axis} is free ({size}); devices run static shapes. "
                    "Export it again without dynamic_shapes for that axis"
                )
    flat = [
        torch.zeros(
            [size if isinstance(size, int) else 1 for size in values[tensor].shape],
            dtype=values[tensor].dtype,
        )
        for tensor in inputs
    ]
    arguments, keywords = pytree.tree_unflatten(flat, program.call_spec.in_spec)
    try:
        with torch.no_grad():
            return torch.export.export(program.module(), arguments, keywords, strict=False)
    except Exception as error:  # a guard of the program, or its own operators, refuse batch 1
        reason = f"{error}".partition("\n")[0]
        raise RecipeError(f"the program cannot run with batch 1: {reason}. Export it with batch 1") from error


def digest(program: Any) -> str:
    """SHA-256 of the program's graph, shapes and weights; equal for the same model exported twice."""
    import torch

    found = hashlib.sha256()
    for name, module in program.graph_module.named_modules():
        if isinstance(module, torch.fx.GraphModule):
            found.update(f"{name}\n{module.graph}\n".encode())
    for name, value in sorted(_values(program).items()):
        if isinstance(value, torch.Tensor):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
    for spec in (*program.graph_signature.input_specs, *program.graph_signature.output_specs):
        found.update(f"{spec}\n".encode())
    for name, tensor in sorted({**program.state_dict, **program.constants}.items()):
        found.update(f"{name} ".encode())
        if isinstance(tensor, torch.Tensor):
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(type(tensor)).encode())
    return found.hexdigest()


def _check_archive(path: Path) -> None:
    """Refuse what is not a .pt2 archive before PyTorch tries its old, pickled formats on it."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
    except zipfile.BadZipFile as error:
        raise RecipeError(f"{path} is not a .pt2 archive; save the model with torch.export.save") from error
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}") from error
    if not any(member.rpartition("/")[2] == "archive_format" for member in members):
        raise RecipeError(
            f"{path} is a PyTorch file but no exported program (a state_dict or a TorchScript file, perhaps); "
            "save the model with torch.export.save(torch.export.export(model, example_inputs), path)"
        )


def _values(program: Any) -> dict[str, Any]:
    return {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}


def _edges(program: Any) -> tuple[list[str], list[str]]:
    inputs, outputs = (
        [
            name for name in names if isinstance(name, str)
        ]  # what is no name is a constant argument such as None
        for names in (program.graph_signature.user_inputs, program.graph_signature.user_outputs)
    )
    if len(inputs) != len(program.graph_signature.user_inputs):
        inputs = [name for name in inputs if name in _placeholders(program)]
    return inputs, outputs


def _placeholders(program: Any) -> set[str]:
    import torch

    return {
        node.name
        for node in program.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor)
    }


def _named_once(tensors: Sequence[str]) -> list[tuple[str, str]]:
    """A tensor that is returned twice gets a number."""
    return [
        (f"{tensor}_{index}" if tensor in tensors[:index] else tensor, tensor)
        for index, tensor in enumerate(tensors)
    ]


def _default_layout(value: Any) -> str:
    return "NCHW" if value.dim() == 4 and value.dtype.is_floating_point else ""


def _spec(name: str, value: Any, layout: str = "") -> TensorSpec:
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise UnsupportedError(
            f"tensor {name!r} is {dtype}; the edges of a model must be one of {', '.join(DTYPES)}"
        )
    try:
        return TensorSpec(name, tuple(int(size) for size in value.shape), dtype, layout)
    except ValueError as error:
        raise RecipeError(str(error)) from error
