"""Engines: the same ServerApp and ClientApp, in this process, on Ray, or on Flower's own SuperLink and SuperNodes."""
