"""AutoAttack: an ensemble of attacks (Croce and Hein 2020, arXiv 2003.01690)."""
