"""Metrics of every task: per-study quantities, and statistics of them under study weights."""
