"""Benchmarks: quality (answers, fidelity to the full cache) and speed (against plain llama.cpp)."""
