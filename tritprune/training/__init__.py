"""Training: the stages of a run, the loop that they share, and what they leave on disk."""
