"""The degradation sweep: trains plain and residual networks by depth, and records the run in a file."""
