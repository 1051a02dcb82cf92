"""Trained networks from runs, files and the hub, and conversions of other layouts."""
