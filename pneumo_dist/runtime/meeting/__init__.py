"""How the ranks of a job find one another, check one another, and choose device and backend. `group.init` does it."""
