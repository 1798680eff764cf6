"""Files that scorers read: one safetensors file each, checked before use. Nothing is executed, nothing is downloaded.

Tensors carry the weights; one metadata entry, JSON, says which method reads them and which model they were made for.
`convert` makes such a file of weights that were released elsewhere.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialized
from torch import Tensor

from kvzip.scoring.base import Scorer, ScoringContext
from kvzip.scoring.registry import get_scorer

FORMAT = "kvzip-scorer/1"
HOW = "nothing is downloaded: kvzip.scoring.files.convert makes one of released weights, tools.train_gate trains a gate"
_KEY = "kvzip"
LAYER_NAME = re.compile(r"layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class ScorerFile:
    """Weights of a method with where they come from.

    Attributes:
        method: name of the scorer that reads them.
        tensors: by name, float32; layers are the model's prunable layers in order.
        model: what they were made for, in words; model_id: fingerprint of its weights, "" = unknown.
        settings: further numbers and words of the method.
        where: the file's path, for messages.
    """

    method: str
    tensors: Mapping[str, Tensor]
    model: str = ""
    model_id: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    where: str = "the given weights"

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            if not isinstance(tensor, Tensor) or not bool(tensor.isfinite().all()):
                raise ValueError(f"{self.where}: {name!r} is not a tensor of finite numbers")

    def save(self, path: str | PathLike[str]) -> None:
        """Write the file; the same content gives the same bytes."""
        header = {name: getattr(self, name) for name in ("method", "model", "model_id")}
        header |= {"format": FORMAT, "settings": dict(self.settings)}
        tensors = {name: tensor.detach().cpu().float().contiguous() for name, tensor in self.tensors.items()}
        Path(path).write_bytes(serialized(tensors, metadata={_KEY: json.dumps(header, sort_keys=True)}))

    @classmethod
    def load(cls, path: str | PathLike[str], method: str) -> ScorerFile:
        """Read a file for the scorer `method`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a whole file of this format, or one for another scorer.
        """
        if not isinstance(path, str | PathLike):
            raise ValueError(f"path of scorer {method!r} must be that of a file, got {path!r}")
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file {str(path)!r} for scorer {method!r}; {HOW}")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(_KEY, "null"))
                # Copies: what safetensors returns is a view of the file, which may change or vanish later.
                tensors = {name: file.get_tensor(name).to(torch.float32, copy=True) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, json.JSONDecodeError, RecursionError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            found = header.get("format") if isinstance(header, dict) else None
            raise ValueError(f"{path} has format {found!r}; expected {FORMAT!r}; {HOW}")
        if header.get("method") != method:
            raise ValueError(f"{path} is a file for scorer {header.get('method')!r}, not for {method!r}")
        model, model_id = (str(header.get(name, "")) for name in ("model", "model_id"))
        settings = header.get("settings")
        return cls(method, tensors, model, model_id, settings if isinstance(settings, dict) else {}, str(path))

    def check_model(self, weights: str) -> None:
        """Raise ValueError where the file was made for other weights than those with the fingerprint `weights`."""
        if self.model_id and weights and self.model_id != weights:
            raise ValueError(
                f"{self.where} was made for {self.model or 'a model'} with weights {self.model_id}, this model has "
                f"{weights}; any_weights=True uses it all the same (another dtype counts as other weights); {HOW}"
            )

    def check_shapes(self, shapes: Mapping[str, Sequence[str]], sizes: Mapping[str, int]) -> None:
        """Raise ValueError where tensors are missing, unknown or of the wrong shape.

        Args:
            shapes: for each tensor its dimensions by name, such as ("layers", "heads", "head_dim").
            sizes: of those dimensions that are known; the others only have to agree with each other.
        """
        if set(self.tensors) != set(shapes):
            raise ValueError(f"{self.where} has tensors {sorted(self.tensors)}; expected {sorted(shapes)}")
        known = dict(sizes)
        for name, dimensions in shapes.items():
            found = tuple(self.tensors[name].shape)
            if len(found) == len(dimensions):
                for dimension, size in zip(dimensions, found, strict=True):
                    known.setdefault(dimension, size)
            expected = tuple(known.get(dimension) for dimension in dimensions)
            if found != expected:
                raise ValueError(
                    f"{self.where}: {name!r} has shape {found}, expected {expected} ({', '.join(dimensions)})"
                )


@dataclass(frozen=True)
class FileScorer(Scorer):
    """A method whose weights come from a file, or from tensors under the file's names.

    Args:
        path: file in this project's format, see `convert`.
        weights: the tensors themselves, in place of a file.
        any_weights: use a file that was made for other weights than the model's (a fine-tune, another dtype).
    """

    shapes: ClassVar[Mapping[str, Sequence[str]]] = {}
    by_layer: ClassVar[bool] = True  # tensors have a row a prunable layer, or its number in their names
    needs: ClassVar[str] = "a file of weights made for the model"

    path: str | PathLike[str] | None = None
    weights: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)
    any_weights: bool = False

    def __post_init__(self) -> None:
        if self.path is not None and self.weights is not None:
            raise ValueError(f"scorer {self.name!r} takes path or weights, not both")
        if self.has_file:
            self.check_file({})

    @property
    def has_file(self) -> bool:
        """Whether there is a file or tensors."""
        return self.path is not None or self.weights is not None

    @cached_property
    def file(self) -> ScorerFile:
        """What was given.

        Raises:
            FileNotFoundError, ValueError: no file, or one that cannot be used.
        """
        if self.weights is not None:
            return ScorerFile(self.name, self.weights)
        if self.path is None:
            raise ValueError(f"scorer {self.name!r} needs a file: {self.name}(path='...'); {HOW}")
        return ScorerFile.load(self.path, self.name)

    def check_file(self, sizes: Mapping[str, int]) -> None:
        """Raise ValueError where the tensors are not those of the method, or not of the given sizes."""
        self.file.check_shapes(self.shapes, sizes)

    def check(self, context: ScoringContext) -> None:
        """Raise ValueError where the file does not fit the model."""
        layers, heads, _ = context.shape
        if not self.any_weights:
            self.file.check_model(context.model_id.get("weights", ""))
        self.check_file({"layers": layers, "heads": heads, "head_dim": context.layers[0].all_keys.shape[-1]})

    @classmethod
    def released(cls, tensors: Mapping[str, Tensor], source: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The file's tensors and settings, of the `tensors` of a release and what lies beside its file `source`."""
        return dict(tensors), {}


def convert(
    method: str,
    source: str | PathLike[str],
    out: str | PathLike[str],
    *,
    model: str = "",
    model_id: str = "",
    layers: Sequence[int] | None = None,
) -> None:
    """Make a file for a scorer of weights that were released elsewhere and lie on this machine.

    | method | source |
    |---|---|
    | `qfilter` | `model.safetensors` of a Q-Filters release |
    | `kvzap` | `model.safetensors` of a KVzap release |
    | `fastkvzip` | the `.pt` file of a Fast KVzip release |
    | `expected_attention_stats` | `model.safetensors` of released statistics |
    | `duo_attention` | `full_attention_heads.tsv` of DuoAttention; `config.json` beside it is read too |
    | `restorekv` | `adapter_model.safetensors` of a RestoreKV release; `adapter_config.json` and
      `restore_embeddings.safetensors` beside it are read too |

    Args:
        method: name of the scorer.
        source: the released file; a `.pt` file is read as plain tensors, nothing in it is executed.
        out: the file to write.
        model: what the weights were made for, in words.
        model_id: `ModelKVzip.model_id["weights"]` of that model, which the scorer then insists on; "" = any model whose
            shapes fit.
        layers: indices of the prunable layers where the release has others too (hybrid models); None = all.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not weights of this method.
    """
    source, reader = Path(source), type(get_scorer(method))
    if not issubclass(reader, FileScorer):
        raise ValueError(f"scorer {method!r} reads no file")
    if not source.is_file():
        raise FileNotFoundError(f"no file {str(source)!r} to convert")
    read: dict[str, Callable[[Path], Mapping[str, Tensor]]] = {
        ".safetensors": load_file,
        ".pt": _from_pt,
        ".tsv": _from_tsv,
    }
    if source.suffix not in read:
        raise ValueError(f"{source} is none of {tuple(read)}")
    try:
        tensors = {_renamed(name): tensor.float() for name, tensor in read[source.suffix](source).items()}
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{source} cannot be read as plain tensors: {error}") from error
    tensors, settings = reader.released(tensors, source)
    if layers is not None:
        if not reader.by_layer:
            raise ValueError(f"weights of {method!r} are not by layer: layers={list(layers)} cannot be picked")
        tensors = dict(_only_layers(tensors, layers))
    file = ScorerFile(method, tensors, model, model_id, settings, str(source))
    reader(weights=file.tensors)  # it says what is wrong with them
    file.save(out)


def _renamed(name: str) -> str:
    """Names in releases: layers of a Fast KVzip file are a list called `module`."""
    return re.sub(r"^module\.(?=\d)", "layers.", name)


def _from_pt(path: Path) -> dict[str, Tensor]:
    return dict(_flat(torch.load(path, map_location="cpu", weights_only=True), ""))


def _flat(tree: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield prefix.removesuffix("."), tree
    elif isinstance(tree, Mapping | list | tuple):
        for name, branch in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _flat(branch, f"{prefix}{name}.")


def _from_tsv(path: Path) -> dict[str, Tensor]:
    scores = torch.from_numpy(np.loadtxt(path, delimiter="\t", ndmin=2))
    return {"head_scores": scores.clamp(0, 1)}  # trained values may leave the range by a little


def _only_layers(tensors: Mapping[str, Tensor], layers: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """Stacked tensors lose the other rows, numbered ones are dropped or numbered anew."""
    numbered = {name: match for name in tensors if (match := LAYER_NAME.fullmatch(name))}
    there = {int(match[1]) for match in numbered.values()}
    for name, tensor in tensors.items():
        if name not in numbered:
            if not all(0 <= index < len(tensor) for index in layers):
                raise ValueError(f"layers {list(layers)} are not all among the {len(tensor)} of {name!r}")
            yield name, tensor[list(layers)]
    if there and not there.issuperset(layers):
        raise ValueError(f"layers {list(layers)} are not all among {sorted(there)}")
    for row, index in enumerate(layers):
        for name, match in numbered.items():
            if int(match[1]) == index:
                yield f"layers.{row}.{match[2]}", tensors[name]
