"""C for CPUs: Langevin chains, stacked perceptrons, transformers that denoise, draws of training times."""
