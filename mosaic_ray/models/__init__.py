"""Classifiers, generators, discriminators, sub-models of partial width, and conversion of weights to and from numpy."""
