"""What a person looks at. Everything here reads plain facts (a summary, counts) and computes no experiment."""
