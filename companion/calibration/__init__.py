"""How often the method is wrong: the unchanged pipeline on models whose mechanism was built, and the error rates of its verdicts."""
