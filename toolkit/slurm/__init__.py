"""Training as a SLURM job: checked against the cluster, rendered as an sbatch script, submitted. Imports no torch."""
