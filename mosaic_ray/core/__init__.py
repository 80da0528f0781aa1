"""Small types, errors, seeds and health rules that every package uses."""
