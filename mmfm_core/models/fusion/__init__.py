"""Fusion: the encoders' tokens in, one state per study out. Every fusion takes any subset of them."""
