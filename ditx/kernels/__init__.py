"""Faster functions of the same blocks: only scripts and commands import this room."""
