"""Time and memory of the fused loss and its peers: `python -m bench`, described in docs/benchmarks.md."""
