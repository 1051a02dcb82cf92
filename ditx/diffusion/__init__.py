"""Diffusion as pure functions of one example: schedules, losses, guidance and samplers, for any network.

A network is a function `Predict: (x, t) -> output`. `x` is one image `h w c`. `t` counts training steps, from 0 next to
the data to 1000 at the noise. The output has the channels of `x`, or twice as many with a learned variance: prediction
first. A schedule knows the time that its network reads (`time`) and the meaning of the output (`prediction`).
"""
