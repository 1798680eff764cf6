"""Benchmark data: datasets by name, each with its loader, its prompt and its metric."""

from kvzip.data.record import Record
from kvzip.data.registry import (
    GROUPS,
    Dataset,
    Options,
    dataset,
    generate,
    generated_names,
    list_datasets,
    load,
    names,
    resolve,
    score,
)

__all__ = [
    "GROUPS",
    "Dataset",
    "Options",
    "Record",
    "dataset",
    "generate",
    "generated_names",
    "list_datasets",
    "load",
    "names",
    "resolve",
    "score",
]
