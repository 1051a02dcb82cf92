"""Faster functions of the same blocks. Networks do not import this room; training and sampling hand them in."""
