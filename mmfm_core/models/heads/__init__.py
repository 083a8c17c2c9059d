"""Heads: what a task reads from the fused state, what it is taught by, and what it is judged by."""
