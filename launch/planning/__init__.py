"""From the words of a request to a plan; nothing is started or written in here."""
