"""Kernels and training on CUDA, against the plain path.

A machine that has CUDA needs flash-attn, TransformerEngine, NVIDIA's apex and bitsandbytes too: what is absent fails,
with the way to install it. Ranks are forked, so that no test leaves a CUDA context for later ones to inherit.
"""
