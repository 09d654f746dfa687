"""What comes with a checkout and not with the package: studies, evaluation, benchmarks, training."""
