"""What tools/benchmark.py measures with."""
