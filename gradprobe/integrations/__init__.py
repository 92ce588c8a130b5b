"""Probes for trainers: Lightning's, that of transformers, and loops of accelerate. Each module needs its library."""
