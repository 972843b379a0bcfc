"""What is behind tools/robustness.py: the corruptions, the evaluation, its tables and its figures."""
