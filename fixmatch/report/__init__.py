"""What a run came to, as one page without any file beside it: readable on a phone, in the dark and printed.

predictions computes what a page shows of single images and keeps it in the run folder, record reads a run folder,
figures has the sums, verdict the sentences, plots the curves, and page puts them together.
"""
