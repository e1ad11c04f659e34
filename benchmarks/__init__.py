"""What the library costs, measured: `python -m benchmarks.NAME` prints one line of JSON per figure."""
