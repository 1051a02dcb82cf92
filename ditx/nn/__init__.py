"""Networks: pure functions of one example and their arrays, ignorant of diffusion, devices and precision."""
