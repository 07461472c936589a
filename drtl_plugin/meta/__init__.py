"""Meta-learning and few-shot adaptation as functions of a network's parameters."""
