"""Prompt sets: reading, checking and tokenizing them, the groups of tokens in a prompt, and public sets by name.

Texts are looked at here and labelled; nothing here runs a model.

Public: pairs (format, validation, fewer of them), tokens (chat template, token pairs, openers), positions (groups of
tokens), invented (the shipped models' language), public (sets by name, partners of equal length, a user's wrappers).
"""
