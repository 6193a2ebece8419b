"""Streams of requests: when they arrive, how they are played, what is made of their times."""
