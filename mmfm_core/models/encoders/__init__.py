"""Encoders: one modality in, tokens of the model's width out. Each carries its own modality type embedding."""
