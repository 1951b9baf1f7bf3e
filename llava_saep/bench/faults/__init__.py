"""Runs that are killed at random moments and go on: what is lost, and how long until nothing is left of them."""
