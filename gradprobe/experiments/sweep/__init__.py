"""Trains plain and residual networks by depth, and stores what happened."""
