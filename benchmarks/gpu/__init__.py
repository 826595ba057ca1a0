"""What `benchmarks/gpu_run.py` runs on a GPU that is at hand for minutes."""
