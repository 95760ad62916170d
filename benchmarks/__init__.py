"""What exact interventions cost: against other tools (`peers`), against size (`scaling`, `sweeps`, `cost_model`) and on a GPU
(`gpu`); and whether a disturbed run ends as an undisturbed one (`faults`)."""
