"""Models: any transformers model, hooks on its modules, interventions."""
