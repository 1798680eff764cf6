"""Static scores of whole KV heads, as small readable files."""

from kvzip.head_scores.head_scores import HeadScores, available, load

__all__ = ["HeadScores", "available", "load"]
