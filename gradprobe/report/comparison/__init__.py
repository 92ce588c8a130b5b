"""Two runs side by side: the first step at which they differ, and where. Needs no torch."""
