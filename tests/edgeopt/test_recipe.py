# SPDX-License-Identifier: Apache-2.0
"""A recipe's every key is known, typed and digested."""

from pathlib import Path

import pytest

from edgeopt.recipe import Recipe, load_recipe
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.tensor import TensorSpec


def _write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_full_recipe_is_read(tmp_path: Path) -> None:
    recipe = load_recipe(
        _write(
            tmp_path,
            """
name = "net"
version = "3"
precisions = ["int8"]
labels = "labels.txt"
[preprocess]
resize = 256
[calibration]
method = "minmax"
samples = 16
[quantize]
exclude = ["Softmax"]
[[inputs]]
name = "x"
shape = [1, 3, 8, 8]
dtype = "float32"
layout = "NCHW"
""",
        )
    )
    assert (recipe.name, recipe.version, recipe.precisions, recipe.exclude) == (
        "net",
        "3",
        ("int8",),
        ("Softmax",),
    )
    assert recipe.calibration.samples == 16
    assert recipe.inputs == (TensorSpec("x", (1, 3, 8, 8), "float32", "NCHW"),)
    assert recipe.labels == str(tmp_path / "labels.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("precision = ['int8']", "did you mean 'precisions'"),
        ("precisions = ['int7']", "unknown precision 'int7'"),
        ("[calibration]\nmetod = 'minmax'", "did you mean 'method'"),
        ("[calibration]\nsamples = 'many'", "expected int, found str"),
        ("[quantize]\nexlude = []", "did you mean 'exclude'"),
        ("quantize = 3", "must be a table"),
        ("name = 'No Spaces'", "name 'No Spaces'"),
        ("[[inputs]]\nname='x'\nshape=[0]\ndtype='float32'", "static and positive"),
        ("= 3", "is not TOML"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(_write(tmp_path, text))


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*none\.toml"):
        load_recipe(tmp_path / "none.toml")


def test_equal_recipes_have_equal_digests() -> None:
    assert Recipe(name="a").digest() == Recipe(name="a").digest()
    assert Recipe(name="a").digest() != Recipe(name="b").digest()


def test_a_pass_gets_its_own_options(tmp_path: Path) -> None:
    from edgeopt.passes.round_weights import Options

    recipe = load_recipe(_write(tmp_path, "[passes.round_weights]\nsamples = 8\n"))
    assert recipe.options("round_weights") == Options(samples=8)
    assert recipe.options("quantize_static") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[passes.round_weigths]\nsamples = 8\n", "round_weights"),
        ("[passes.round_weights]\nsample = 8\n", "samples"),
        ("[passes.round_weights]\nsamples = 0\n", "positive"),
        ("[passes.quantize_static]\nx = 1\n", "no options"),
    ],
)
def test_a_wrong_option_of_a_pass_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(_write(tmp_path, text))
