"""The output of the commands: states, progress, results and the reasons of failures."""
