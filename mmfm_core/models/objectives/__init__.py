"""Objectives: what encoders are pre-trained by, without labels.

Captioning is the report head, and contrast the retrieval head: both are pre-training when a stage trains them first.
"""
