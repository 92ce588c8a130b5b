"""Compares remedies: initialisation, normalisation, clipping and shortcuts."""
