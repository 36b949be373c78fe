"""What a model is trained for: one file per objective, named by `objective.name`, each with an OBJECTIVE."""
