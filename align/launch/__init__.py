"""Where a run's processes come from: this machine, or a job of Slurm."""
