"""The Torch side: the reference's step, file for file beside fixmatch/, same names, same order."""
