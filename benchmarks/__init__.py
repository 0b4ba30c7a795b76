"""Measurements of nbrunner against plain transformers: ``python -m benchmarks NAME --json``."""
