"""From the command line to a plan. Starts nothing and writes nothing."""
