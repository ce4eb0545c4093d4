"""Where images and labels come from. Each kind of source has a file of its own."""
