"""The identity experiment: a deep network built from a shallow one, and stacks that learn y = x."""
