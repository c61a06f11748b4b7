"""A cluster of several hosts whose machines come, go and die while a run trains on it."""
