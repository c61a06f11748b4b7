"""One script for each claim; each runs both sides in turns, in one run, on the machine at hand."""
