"""Data-free distillation: generators, prototypes, experts, teacher, student."""
