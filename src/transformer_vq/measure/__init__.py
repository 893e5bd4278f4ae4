"""How fast and how large: benchmarks, and the memory of the process."""
