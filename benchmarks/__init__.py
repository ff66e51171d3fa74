"""Benchmarks: ratios within one run, against the bare passes."""
