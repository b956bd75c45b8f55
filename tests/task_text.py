"""A text that is longer than the context of the tasks' small models."""

TEXT = "The cat sees the big red house. What does the cat see? The answer is the house, of course. " * 4
