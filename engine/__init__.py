"""Training and evaluation of a model, and the state between two steps."""
