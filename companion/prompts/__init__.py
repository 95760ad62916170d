"""Prompt sets: reading, checking and tokenizing them, the groups of tokens in a prompt, and public sets by name.
Texts are looked at here and labelled; nothing here runs a model.
"""
