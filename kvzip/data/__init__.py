"""Benchmark data: datasets by name, each with its loader, its prompt and its metric."""

from kvzip.data.record import Record
from kvzip.data.registry import (
    Dataset,
    Options,
    dataset,
    generate,
    generated_names,
    list_datasets,
    load,
    names,
    score,
)

__all__ = [
    "Dataset",
    "Options",
    "Record",
    "dataset",
    "generate",
    "generated_names",
    "list_datasets",
    "load",
    "names",
    "score",
]
