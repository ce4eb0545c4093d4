"""How views are made: what is drawn at random, and what is done to the pixels."""
