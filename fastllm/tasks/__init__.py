"""What models are used for: translating, judging texts, answering questions. Examples, predictions, scores."""
