"""Meshes, FSDP, processes and compilation."""
