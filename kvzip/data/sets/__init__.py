"""One file, one family of datasets: loader, prompt and metric together; `registry` imports them all on first use."""
