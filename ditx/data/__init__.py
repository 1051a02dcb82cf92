"""Images and latents in, batches out."""
