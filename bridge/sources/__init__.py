"""A path with weights: which model it holds, and its tensors into a live model. For training, the API and convert."""
