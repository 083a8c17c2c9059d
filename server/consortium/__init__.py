"""The coordinator of real hospitals: its certificates, its Flower server, who is enrolled, and the runs."""
