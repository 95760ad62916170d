"""What exact interventions cost: against other tools (`peers`), against size (`scaling`, `sweeps`, `cost_model`), in a whole
run (`profile_run`), and on a GPU (`gpu`)."""
