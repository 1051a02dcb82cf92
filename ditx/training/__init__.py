"""One training step, and the files that a run keeps."""
