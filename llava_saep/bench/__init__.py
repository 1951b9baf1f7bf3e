"""Measurements of speed and memory. They need torch alone; plots need matplotlib (the extra `bench`)."""
