"""Attacks on what leaves a site: what they find, to be held against what the accountants promise."""
