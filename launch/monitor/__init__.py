"""What people see of a run: states, progress, results, reasons for failures."""
