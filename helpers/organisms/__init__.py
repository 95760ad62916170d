"""The embedded chat model: its invented, inert language, its training, and its evaluation."""
