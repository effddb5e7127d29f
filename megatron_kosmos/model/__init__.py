"""The mathematics of KOSMOS: Magneto decoder, vision tower, resampler, splice and loss."""
