"""One file, one method; `registry` imports them all on first use."""
