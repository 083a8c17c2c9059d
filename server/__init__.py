"""The coordinator's side: rounds, aggregation, the run's record; and the simulation of a whole federation."""
