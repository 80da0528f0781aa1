"""Data sets in memory, their partition over clients, and the tensor operations that prepare a batch."""
