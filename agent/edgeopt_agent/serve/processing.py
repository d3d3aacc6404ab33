# SPDX-License-Identifier: Apache-2.0
"""What a manifest says of pre- and post-processing, made ready once a model: files and texts in, answers for people out.

`preprocess` is a photo's (`edgeopt_agent.images`, where `kind` is "image" or not said) or a text's
(`edgeopt_agent.text`, `kind` "text"). `postprocess` is one of `edgeopt_agent.answers`: `kind` "classify" (or not
said), "detect" or "embed".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt_wire import seam
from edgeopt_wire.archive import safe_path
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.manifest import Manifest

if TYPE_CHECKING:
    import numpy as np

    Arrays = dict[str, np.ndarray]

KINDS_IN = ("image", "text")


class Processing:
    """Both directions for one package, extracted in `folder`."""

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        self._manifest = manifest
        self._folder = folder
        self.kind_in = str(manifest.preprocess.get("kind", "image")) if manifest.preprocess else ""
        self.kind_out = str(manifest.postprocess.get("kind", "classify")) if manifest.postprocess else ""
        self._reader: Callable[[Sequence[Any]], Arrays] | None = None
        self._labels: tuple[str, ...] | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes, empty where the package has none."""
        if self._labels is None:
            path = self._manifest.labels
            text = (self._folder / safe_path(path)).read_text(encoding="utf-8") if path else ""
            self._labels = tuple(text.splitlines())
        return self._labels

    @property
    def needs_inputs(self) -> bool:
        """Whether `finish` looks at the inputs too: pooling needs their mask."""
        return self.kind_out == "embed" and self._manifest.postprocess.get("pool") == "mean"

    def prepare(self, items: Sequence[Any]) -> Arrays:
        """Turn files, texts or decoded photos (uint8, height x width x 3) into the signature's inputs, batched.

        Raises:
            RecipeError: The package does not say how, or an item is not of that kind.
            UnsupportedError: A library that this needs is not installed.
        """
        if self._reader is None:
            self._reader = self._make_reader()
        return self._reader(items)

    def outputs(self) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        """Name, datatype and shape of what `finish` gives; -1 is an axis that is not known before."""
        from edgeopt_agent.answers import OUTPUTS

        return OUTPUTS.get(self.kind_out, ())

    def finish(self, outputs: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Turn the model's outputs into those of `outputs()`.

        Raises:
            RecipeError: The manifest's keys do not fit the model's outputs.
        """
        from edgeopt_agent.answers import finish

        return finish(self.kind_out, self._manifest.postprocess, outputs, inputs, self.labels)

    def _make_reader(self) -> Callable[[Sequence[Any]], Arrays]:
        import numpy as np

        signature, keys = self._manifest.signature_inputs, self._manifest.preprocess
        if self.kind_in and self.kind_in not in KINDS_IN:
            raise RecipeError(
                f"preprocess: {seam.unknown('kind', self.kind_in, KINDS_IN)}; send the tensors themselves"
            )
        if self.kind_in == "text":
            from edgeopt_agent.text import make_tokenizer

            vocabulary = self._folder / safe_path(str(keys.get("vocabulary", "")))
            return make_tokenizer(vocabulary, keys, signature).encode
        if not self.kind_in:
            raise RecipeError(
                f"{self._manifest.title} does not say how files become its input; send "
                f"{signature[0].dtype} {list(signature[0].shape)}"
            )
        from edgeopt_agent.images import photo_tensor

        spec = signature[0]
        if len(signature) != 1:
            raise RecipeError(
                f"preprocess of photos fits one input, the model takes {[s.name for s in signature]}"
            )
        return lambda items: {spec.name: np.concatenate([photo_tensor(item, keys, spec) for item in items])}
