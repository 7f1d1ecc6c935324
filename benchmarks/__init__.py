"""Reproducible measurements. Each prints JSON and is run as `python -m benchmarks.NAME`."""
