"""Networks and their weights: classifiers, generators, discriminators, and the way in and out of numpy."""
