"""Networks: pure functions of one example and their arrays. They know nothing of diffusion, devices or precision."""
