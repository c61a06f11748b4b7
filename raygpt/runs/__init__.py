"""What a run's folder says of it, for people: curves, accounts, the report, lists of runs.

Everything here is read from files, so it works while a run trains and after it is gone; it needs
neither torch nor Ray.
"""
