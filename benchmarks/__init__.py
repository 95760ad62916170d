"""What exact interventions cost: against other tools (`peers`), against size (`scaling`), and on a GPU (`gpu`)."""
