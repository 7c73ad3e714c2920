"""Where scripts copied from `launch/slurm/train.sbatch` before 0.2 look for the life of a job."""
