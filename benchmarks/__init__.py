"""What an update and an import cost, beside the libraries that people use today: `python -m benchmarks`."""
