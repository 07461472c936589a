"""Relations between tasks: knowledge graph, gradient weights, estimators, and training of the DRN."""
