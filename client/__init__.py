"""The hospital's side: the agent that sees patients, and the relay that sees the network."""
