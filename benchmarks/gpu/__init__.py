"""The parts of `benchmarks/gpu_run.py`, which runs on a GPU that is available for minutes."""
