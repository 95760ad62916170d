"""What a model does with prompts, plain or under a steering: reading them, answering, and labels for the answers.
Hooks live here because plain and steered answers come out of one decoder.
"""
