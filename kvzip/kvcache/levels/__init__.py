"""One file, one level; `selection` imports them all on first use."""
