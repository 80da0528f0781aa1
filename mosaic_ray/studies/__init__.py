"""Small experiments about one part of Mosaic, each a command: `mosaic experiment NAME`."""
