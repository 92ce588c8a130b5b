"""The comparison of remedies: initialisation, normalisation, clipping and shortcuts."""
