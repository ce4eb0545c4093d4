"""Where images and labels come from, one file a kind of source."""
