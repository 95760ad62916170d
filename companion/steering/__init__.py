"""Steering as a defence: directions, published methods and our own, budgets, and the experiment that compares them."""
