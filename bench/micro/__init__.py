"""Micro-benchmarks: one function each, as ratios measured in one run. See bench/README.md."""
