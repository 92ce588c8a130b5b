"""Shows that a deeper network could be as good: constructed identity layers, and stacks that learn the identity."""
