"""Diffusion as pure functions of one example: schedules, objectives, guidance and samplers, for any network.

A network enters as `Predict: (x, t) -> output`. `x` is one image `h w c`; `t` is in units of training steps, 0 next to
the data and 1000 next to the noise; the output has the channels of `x`, followed, if it predicts the variance, by as
many again. A schedule says what its network is fed (`time`) and what the output means (`prediction`). Networks of other
conventions are wrapped first, as `ditx.diffusion.flow.from_sit` does.
"""
