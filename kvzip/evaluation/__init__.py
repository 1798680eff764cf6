"""Evaluation: ratio sweeps over benchmark data, their results on disk, and reports."""
